"""Which profiler is at work in this process: CUPTI serves one a process."""

from __future__ import annotations

import os

from moe_eplb.core.errors import UsageError

__all__ = ["WRAPPED", "foreign_profiler", "require_no_profiler", "require_wrapped", "wrapped"]

WRAPPED = "EPLBCTL_UNDER_NSYS"
"""Set, to a mark of the run, in the environment of what our recorder ``nsys`` has started."""

_SIGNS = ("NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "NVPROF_ID")
"""Variables that profilers set for the programs they start."""
_INJECTED = "ToolsInjection"
"""Part of the name of the library that Nsight tools preload."""


def wrapped() -> bool:
    """Whether our recorder ``nsys`` has started this process, so that it must not start another one."""
    return WRAPPED in os.environ


def foreign_profiler() -> str:
    """What says that a profiler which is not ours has started this process, or "" when nothing does."""
    signs = [name for name in _SIGNS if os.environ.get(name)]
    if _INJECTED in os.environ.get("LD_PRELOAD", ""):
        signs.append("LD_PRELOAD")
    return "" if wrapped() else ", ".join(signs)


def require_no_profiler(recorder: str) -> None:
    """Raise UsageError E019 when `recorder` would be a second client of CUPTI in one process."""
    signs = WRAPPED if wrapped() else foreign_profiler()
    if signs:
        raise UsageError(
            "E019", f"the recorder {recorder!r} cannot be used in a process that a profiler has started",
            why=f"CUPTI serves one client a process, and one is there: {signs} is set",
            hint="start the run without that profiler, or use --recorder builtin",
        )  # fmt: skip


def require_wrapped(recorder: str) -> None:
    """Raise UsageError E019 when a run that shall be recorded by ``nsys`` is about to start without it."""
    if recorder == "nsys" and not wrapped():
        raise UsageError(
            "E019", "the recorder 'nsys' wraps a whole program, and nothing wraps this one",
            hint="start it by `eplbctl run SCENARIO --recorder nsys`, or set record.recorder to builtin",
        )  # fmt: skip
