"""What can still be said of ranks that died or hung."""

from __future__ import annotations

from pathlib import Path

from moe_eplb.recording.log_format import last_event
from moe_eplb.session.folder import events_path

__all__ = ["last_events"]


def last_events(folder: Path, ranks: int) -> str:
    """One line a rank: the last event in its log, which outlives the process."""
    lines = []
    for rank in range(ranks):
        path = events_path(folder, rank)
        event = last_event(path) if path.exists() else None
        lines.append(f"  last event of rank {rank}: {event or 'none, it had not started'}")
    return "\n".join(lines)
