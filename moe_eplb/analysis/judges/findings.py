"""What a judge found wrong or missing, and the result that follows: wrong is invalid, missing is unknown."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moe_eplb.core.verdict import CheckResult, Status

if TYPE_CHECKING:  # captures are judged without what reads run folders
    from moe_eplb.analysis.run_folder import RunFolder

__all__ = ["Findings"]


@dataclass
class Findings:
    """Collects findings of one check in the order in which they are met; the first is shown, the others counted."""

    name: str
    expected: str
    _wrong: list[tuple[str, str]] = field(default_factory=list)
    _missing: list[tuple[str, str]] = field(default_factory=list)

    def wrong(self, detail: str, where: object = "") -> None:
        """Something is not what it must be."""
        self._wrong.append((detail, str(where)))

    def missing(self, detail: str, where: object = "") -> None:
        """Something was not observed, so the check cannot pass."""
        self._missing.append((detail, str(where)))

    def need_ranks(self, what: str, folder: RunFolder, present: Collection[int], where: object = "") -> bool:
        """Note ranks that left no row of a kind; whether all did leave one."""
        absent = [rank for rank in folder.ranks if rank not in present]
        if absent:
            self.missing(f"no {what} row of rank {', '.join(map(str, absent))}", where)
        return not absent

    def result(self, observed: str) -> CheckResult:
        """The result; `observed` says in numbers what was looked at."""
        for status, found in ((Status.INVALID, self._wrong), (Status.UNKNOWN, self._missing)):
            if found:
                detail, where = found[0]
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                return CheckResult(self.name, status, observed, self.expected, detail + more, where)
        return CheckResult(self.name, Status.VALID, observed, self.expected)
