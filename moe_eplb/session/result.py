"""What a run ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_eplb.core.errors import ExitCode
from moe_eplb.core.verdict import Verdict

__all__ = ["Progress", "RunResult"]

Progress = Callable[[int, int], None]
"""Called with the iterations done and their total."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run folder, the verdict on it, and the seconds from start to verdict."""

    folder: Path
    verdict: Verdict
    seconds: float

    @property
    def exit_code(self) -> ExitCode:
        """The verdict's exit code."""
        return self.verdict.exit_code
