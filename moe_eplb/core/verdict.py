"""The three-valued verdict that every report and every exit code comes from. Missing evidence is never a pass."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_eplb.core.errors import ExitCode

__all__ = ["CheckResult", "Status", "Verdict", "worst"]


class Status(enum.StrEnum):
    """Outcome of a check, best first."""

    VALID = "valid"
    UNKNOWN = "unknown"
    INVALID = "invalid"


_RANK = {Status.VALID: 0, Status.UNKNOWN: 1, Status.INVALID: 2}
_EXIT = {Status.VALID: ExitCode.VALID, Status.UNKNOWN: ExitCode.UNKNOWN, Status.INVALID: ExitCode.INVALID}


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of the statuses; of none at all, unknown, because nothing was checked."""
    return max(statuses, key=_RANK.__getitem__, default=Status.UNKNOWN)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One judged check: what was seen, what was needed, and the first place where they differ."""

    name: str
    status: Status
    observed: str
    expected: str
    detail: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """All checks of one run. `failure` says why a run has no complete evidence (a dead rank, a timeout)."""

    scenario: str
    checks: tuple[CheckResult, ...]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def status(self) -> Status:
        """The worst status of all checks."""
        return worst(check.status for check in self.checks)

    @property
    def exit_code(self) -> ExitCode:
        """FAILED when the run did not end by itself, else the code of the worst status."""
        return ExitCode.FAILED if self.failure else _EXIT[self.status]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `from_json` reads it back."""
        checks = [asdict(check) | {"status": check.status.value} for check in self.checks]
        return {
            "scenario": self.scenario,
            "status": self.status.value,
            "exit_code": int(self.exit_code),
            "failure": self.failure,
            "checks": checks,
            "metrics": dict(self.metrics),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """Inverse of `to_json`."""
        checks = tuple(CheckResult(**(dict(c) | {"status": Status(c["status"])})) for c in data["checks"])
        return cls(data["scenario"], checks, dict(data["metrics"]), tuple(data["notes"]), data["failure"])
