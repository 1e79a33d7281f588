"""Reading a trace back: every record of every rank as numpy arrays, times in int64 ns since the session's start."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.analysis.readers.sqlite_tables import Database, open_database
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, KINDS, UPDATER, Kind, Role

__all__ = ["OPEN", "RankState", "Records", "Trace", "read_trace"]

OPEN = -1
"""End of a range that was never closed."""
_COLUMNS = ("rank", "seq", "start", "end", "kind", "stream", "thread", "layer", "iteration", "a", "b")
_ROLE_OF = {int(kind): info.role for kind, info in KINDS.items()}


@dataclass(frozen=True)
class Records:
    """Columns int64 [N] of N records, ordered by rank and, within a rank, as they were begun."""

    rank: NDArray[np.int64]
    seq: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    kind: NDArray[np.int64]
    stream: NDArray[np.int64]
    thread: NDArray[np.int64]
    layer: NDArray[np.int64]
    iteration: NDArray[np.int64]
    a: NDArray[np.int64]
    b: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rank)

    def where(self, mask: NDArray[np.bool_]) -> Records:
        """The records that a mask [N] selects."""
        return Records(*(getattr(self, name)[mask] for name in _COLUMNS))

    def kinds(self, *kinds: Kind) -> Records:
        """The records of some kinds."""
        return self.where(np.isin(self.kind, [int(kind) for kind in kinds]))

    @cached_property
    def host(self) -> Records:
        """Calls made by the host."""
        return self.where(self.stream == HOST)

    @cached_property
    def device(self) -> Records:
        """Finished work on the device's streams."""
        return self.where((self.stream < UPDATER) & (self.end != OPEN))

    def roles(self) -> NDArray[np.str_]:
        """Role of each record, by its kind; kinds that are not known have the role unknown."""
        kinds, inverse = np.unique(self.kind, return_inverse=True)
        names = [_ROLE_OF.get(int(kind), Role.UNKNOWN).value for kind in kinds]
        return np.array(names, dtype=np.str_)[inverse] if len(names) else np.empty(0, dtype=np.str_)

    def by_rank(self) -> Iterator[tuple[int, Records]]:
        """The records of each rank that has any."""
        for rank in np.unique(self.rank).tolist():
            yield rank, self.where(self.rank == rank)


@dataclass(frozen=True)
class RankState:
    """How complete a rank's log is. `overhead_ns` is the cost of one record, None if it was not measured.

    `missing`: how many of the records that were exported are not in the file any more.
    """

    dropped: int
    closed: bool
    overhead_ns: float | None
    missing: int = 0

    @property
    def complete(self) -> bool:
        """Whether everything that happened was recorded."""
        return self.closed and not self.dropped and not self.missing


@dataclass(frozen=True)
class Trace:
    """One run as it was recorded."""

    path: Path
    records: Records
    ranks: dict[int, RankState]
    provenance: dict[str, str]

    def incomplete(self) -> str:
        """Which logs are cut off or dropped records, in words; empty when none."""
        parts = [f"rank {rank}: {_loss(state)}" for rank, state in sorted(self.ranks.items()) if not state.complete]
        return "; ".join(parts)


def read_trace(path: Path, limits: Limits = DEFAULT_LIMITS) -> Trace:
    """Read a trace that `moe_eplb.recording.export` wrote.

    Raises:
        TraceError: E055 there is no file, E056 it is cut off, damaged, no database, or holds no table of ours, E064 it
            is too large.
    """
    if not path.is_file():
        raise TraceError("E055", "there is no trace", where=str(path))
    try:
        with open_database(path, limits) as database:
            capture = database.pairs("META_DATA_CAPTURE")
            records = _read_records(database)
        ranks = {rank: _rank_state(capture, rank, records) for rank in map(int, capture["EPLB_RANKS"].split())}
    except TraceError as error:
        if error.code == "E064":
            raise
        raise TraceError(
            "E056", "a trace cannot be read", why=f"{error.what}: {error.why}", where=str(path),
            hint="the file is damaged, or another tool wrote it without the table EPLB_RECORD",
        ) from error  # fmt: skip
    except (KeyError, ValueError) as error:
        raise TraceError("E056", "a trace has damaged values", why=repr(error), where=str(path)) from error
    return Trace(path, records, ranks, capture)


def _read_records(database: Database) -> Records:
    if not database.has("EPLB_RECORD"):
        raise ValueError("there is no table EPLB_RECORD")
    table = database.integers("EPLB_RECORD", tuple(name for name in _COLUMNS if name != "end"), {"end": OPEN})
    start, end = table["start"], table["end"]
    if np.any((end < start) & (end != OPEN)):
        raise ValueError(f"{int(((end < start) & (end != OPEN)).sum())} records end before they start")
    order = np.lexsort((table["seq"], table["rank"]))
    return Records(*(table[name][order] for name in _COLUMNS))


def _loss(state: RankState) -> str:
    if state.missing:
        return f"of its records {state.missing} are not in the trace"
    return f"{state.dropped} records dropped" if state.dropped else "log not closed"


def _rank_state(capture: dict[str, str], rank: int, records: Records) -> RankState:
    prefix, there = f"EPLB_RANK_{rank}_", int((records.rank == rank).sum())
    overhead = capture[prefix + "OVERHEAD_NS_PER_RECORD"]
    if overhead != "unknown" and not math.isfinite(float(overhead)):
        raise ValueError(f"a record costs {overhead} ns")
    return RankState(
        dropped=int(capture[prefix + "DROPPED"]),
        closed=capture[prefix + "CLOSED"] == "1",
        overhead_ns=None if overhead == "unknown" else float(overhead),
        missing=max(0, int(capture.get(prefix + "RECORDS", there)) - there),
    )
