"""What a command did with one scenario or run folder, and which exit code several of them make together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_eplb.core.errors import EplbError, ExitCode
from moe_eplb.core.verdict import Verdict

__all__ = ["SEVERITY", "Outcome", "worst_exit_code"]

SEVERITY = (
    ExitCode.VALID, ExitCode.UNKNOWN, ExitCode.INVALID, ExitCode.USAGE, ExitCode.FAILED, ExitCode.INTERNAL,
)  # fmt: skip
"""Exit codes of outcomes, mildest first. Of several outcomes the most severe gives the exit code."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict with where it comes from. `folder` is the run folder when one is kept."""

    name: str
    path: Path
    verdict: Verdict
    seconds: float
    exit_code: ExitCode
    folder: Path | None = None

    @property
    def word(self) -> str:
        """``valid``, ``unknown`` or ``invalid``, or ``failed`` when the run did not end by itself."""
        return "failed" if self.verdict.failure else self.verdict.status.value

    @classmethod
    def of_error(cls, name: str, path: Path, error: EplbError, seconds: float) -> Outcome:
        """The outcome of something that raised instead of reaching a verdict."""
        return cls(name, path, Verdict(name, (), failure=str(error)), seconds, error.exit_code)


def worst_exit_code(codes: Iterable[ExitCode]) -> ExitCode:
    """The most severe of at least one exit code, by `SEVERITY`."""
    return max(codes, key=SEVERITY.index)
