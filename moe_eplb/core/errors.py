"""Every error a user can meet: a code, what happened, why with numbers, a hint, and the exit code it leads to."""

from __future__ import annotations

import enum

__all__ = [
    "BalancerError",
    "EplbError",
    "ExitCode",
    "HostMemoryError",
    "ProtocolError",
    "RunFailed",
    "ScenarioError",
    "TraceError",
    "UsageError",
]


class ExitCode(enum.IntEnum):
    """Exit codes of ``eplbctl``. The numbers are a public contract."""

    VALID = 0
    INVALID = 1
    USAGE = 2
    UNKNOWN = 3
    FAILED = 4
    INTERNAL = 70
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_MEANING: dict[ExitCode, str] = {
    ExitCode.VALID: "every check is valid",
    ExitCode.INVALID: "at least one check is invalid",
    ExitCode.USAGE: "bad usage or bad input",
    ExitCode.UNKNOWN: "evidence is missing, nothing is known to be wrong",
    ExitCode.FAILED: "the run failed: a rank died, hung or ran out of a resource",
    ExitCode.INTERNAL: "a bug in this program",
    ExitCode.INTERRUPTED: "interrupted from the keyboard",
    ExitCode.TERMINATED: "told to end by SIGTERM",
}


class EplbError(Exception):
    """Base of all errors that are reported without a traceback.

    Args:
        code: Stable identifier such as ``"E021"``.
        what: One sentence: what happened.
        why: Numbers and names behind it.
        hint: What to do about it.
        where: ``file:line:col`` or another place, empty when there is none.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, code: str, what: str, *, why: str = "", hint: str = "", where: str = "") -> None:
        super().__init__(code, what, why, hint, where)
        self.code = code
        self.what = what
        self.why = why
        self.hint = hint
        self.where = where

    def __str__(self) -> str:
        place = f" {self.where}" if self.where else ""
        lines = [f"error[{self.code}]{place}: {self.what}"]
        lines += [f"  why: {self.why}"] if self.why else []
        lines += [f"  hint: {self.hint}"] if self.hint else []
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling of exceptions; ranks send errors to their parent.
        return (_rebuild, (type(self), self.code, self.what, self.why, self.hint, self.where))


def _rebuild(kind: type[EplbError], code: str, what: str, why: str, hint: str, where: str) -> EplbError:
    return kind(code, what, why=why, hint=hint, where=where)


class UsageError(EplbError):
    """Wrong arguments, a missing file, a refusal to overwrite (codes E001 to E019)."""

    exit_code = ExitCode.USAGE


class ScenarioError(EplbError):
    """A scenario or a configuration file is not acceptable (codes E020 to E049)."""

    exit_code = ExitCode.USAGE


class TraceError(EplbError):
    """A run folder or a trace cannot be read or judged (codes E050 to E079)."""

    exit_code = ExitCode.USAGE


class ProtocolError(EplbError):
    """The balancer's API was called in an illegal order (codes E100 to E129)."""


class BalancerError(EplbError):
    """The balancer was configured or fed wrongly, or one of its bounded waits ended (codes E130 to 159, 200 to 219)."""


class HostMemoryError(EplbError):
    """Shared host memory cannot be had or is not what it should be (codes E160 to E179)."""


class RunFailed(EplbError):
    """The run ended before its verdict: a rank died or hung (codes E180 to E199)."""
