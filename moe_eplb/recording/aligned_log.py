"""The logs of all ranks on one time axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_eplb.core.errors import TraceError
from moe_eplb.recording.log_format import LogHeader

__all__ = ["AlignedLog", "align"]

_SAME_HOST_NS = 1_000_000_000


@dataclass(frozen=True)
class AlignedLog:
    """One rank's records with times in ns since the session's start; `end` is -1 while a range was never closed.

    Attributes:
        sequence: Row number in the log of each record. Rows that were claimed but not written are left out.
        holes: How many were left out.
    """

    header: LogHeader
    records: np.ndarray
    sequence: np.ndarray
    holes: int

    @property
    def rank(self) -> int:
        """The rank that recorded."""
        return self.header.rank

    @property
    def global_pid(self) -> int:
        """Process number unique over all ranks, with the thread's 24 bits zero."""
        return self.rank << 48 | (self.header.pid & 0xFFFFFF) << 24

    def global_tid(self, thread: int) -> int:
        """Thread number unique over all ranks."""
        return self.global_pid | (thread & 0xFFFFFF)


def align(logs: list[tuple[LogHeader, np.ndarray]]) -> tuple[list[AlignedLog], int]:
    """Put logs on one axis; returns them in rank order and the axis' zero in ns UTC.

    Ranks of one host share CLOCK_MONOTONIC, so their records keep its exact order; between hosts it is as good as the
    hosts' UTC. Two offsets between the clocks that lie within a second belong to one host: hosts boot further apart.
    """
    ordered = sorted(logs, key=lambda log: log[0].rank)
    ranks = [header.rank for header, _ in ordered]
    if len(set(ranks)) != len(ranks):
        raise TraceError("E052", "two event logs claim the same rank", why=f"ranks {ranks}")
    offsets = _host_offsets([header.clock.utc - header.clock.monotonic for header, _ in ordered])
    epoch = min(header.clock.monotonic + offset for (header, _), offset in zip(ordered, offsets, strict=True))
    aligned = [_shift(*log, offset - epoch) for log, offset in zip(ordered, offsets, strict=True)]
    return aligned, epoch


def _host_offsets(offsets: list[int]) -> list[int]:
    hosts: list[int] = []
    for offset in offsets:
        if all(abs(offset - host) > _SAME_HOST_NS for host in hosts):
            hosts.append(offset)
    return [min(hosts, key=lambda host: abs(offset - host)) for offset in offsets]


def _shift(header: LogHeader, records: np.ndarray, shift: int) -> AlignedLog:
    sequence = np.flatnonzero(records["start"])
    shifted = records[sequence]
    is_open = shifted["end"] == 0
    shifted["start"] += shift
    shifted["end"] += shift
    shifted["end"][is_open] = -1
    return AlignedLog(header, shifted, sequence, len(records) - len(sequence))
