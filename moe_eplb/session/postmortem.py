"""What can still be said of ranks that died or hung."""

from __future__ import annotations

from pathlib import Path

from moe_eplb.core.errors import TraceError
from moe_eplb.recording.log_format import last_event
from moe_eplb.session.folder import events_path

__all__ = ["last_events"]


def last_events(folder: Path, ranks: int) -> str:
    """One line a rank: the last event in its log, which outlives the process."""
    return "\n".join(f"  last event of rank {rank}: {_last(events_path(folder, rank))}" for rank in range(ranks))


def _last(path: Path) -> str:
    if not path.exists():
        return "none, it had not started"
    try:
        return str(last_event(path) or "none, it had not started")
    except TraceError as error:
        return f"unknown, {error.what}"
