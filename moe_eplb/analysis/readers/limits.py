"""How much a reader takes in before it says that a file is too large; every bound can be raised by the caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe_eplb.core.errors import TraceError

__all__ = ["DEFAULT_LIMITS", "Limits", "too_large"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one file.

    Attributes:
        events: Rows of one table, or events of one JSON file.
        text_bytes: Bytes of a JSON file once unpacked.
        piece_bytes: Bytes of the largest single event, and of what stands before or after the events.
        seconds: Longest time that one SQL statement, or a program that converts a file, may take.
        kept_text: Characters of all names together.
        lanes: Streams of all GPUs together, ranks, and processes that use a GPU.
    """

    events: int = 20_000_000
    text_bytes: int = 16 << 30
    piece_bytes: int = 8 << 20
    seconds: float = 600.0
    kept_text: int = 1 << 29
    lanes: int = 4096


DEFAULT_LIMITS = Limits()


def too_large(path: Path | str, what: str, why: str) -> TraceError:
    """The error for a file beyond a bound."""
    hint = "cut the trace to the iterations of interest, or raise the limit"
    return TraceError("E064", f"a trace is too large: {what}", why=why, where=str(path), hint=hint)
