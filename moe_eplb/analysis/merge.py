"""Traces of several ranks as one, on one clock.

Clocks are aligned by offsets that the caller knows; else by collectives that all ranks took part in: no rank leaves one
before the last has come, so the ranks' ends lie close together and the median of their differences is the offset. Where
there are too few of them, or they do not agree, the wall clocks that the files state are what is left. How far a clock
can be off is kept and said. What was recorded before the first file's time 0 would get a negative time: all files are
then moved together, which changes no length and no distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Names, Table
from moe_eplb.analysis.collectives import match_collectives
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.analysis.readers.sound import FURTHEST, require_sound
from moe_eplb.core.errors import TraceError

__all__ = ["Alignment", "align", "merge", "merge_aligned"]

_CERTAIN_NS = 100_000
"""A clock that may be off by more than this is reported as uncertain."""
_FEW = 3
_TEXTS = {"gpu": ("name",), "calls": ("name",), "ranges": ("text", "domain", "category")}
_UNTIMED = {"nodes"}


@dataclass(frozen=True, slots=True)
class Alignment:
    """What is added to a file's times. `uncertain_ns` is how far that may be off, None when nobody knows."""

    source: str
    offset: int
    method: str
    uncertain_ns: int | None

    @property
    def certain(self) -> bool:
        """Whether times of this file may be compared with those of others."""
        return self.uncertain_ns is not None and self.uncertain_ns <= _CERTAIN_NS

    def __str__(self) -> str:
        doubt = "of unknown accuracy" if self.uncertain_ns is None else f"give or take {self.uncertain_ns} ns"
        return f"{self.source}: clock moved by {self.offset} ns, {self.method}, {doubt}"


def merge(captures: Sequence[Capture], offsets: Sequence[int] = (), limits: Limits = DEFAULT_LIMITS) -> Capture:
    """One capture of all ranks; what is uncertain about its clocks stands in its notes.

    Files that do not state their rank are numbered in the order given. Processes are told apart by file.

    Args:
        captures: At least one.
        offsets: ns to add to each file's times, where they are known.
        limits: How much of anything the merged capture may hold.

    Raises:
        TraceError: E066 two files hold the same rank, there are more or fewer offsets than files, or clocks lie too far
            apart; E062, E064 what comes of it is not sound, see `moe_eplb.analysis.readers.sound`.
    """
    return merge_aligned(captures, offsets, limits)[0]


def merge_aligned(
    captures: Sequence[Capture], offsets: Sequence[int] = (), limits: Limits = DEFAULT_LIMITS
) -> tuple[Capture, list[str]]:
    """The same as `merge`, with how each file's clock was moved, in words."""
    numbered = _numbered(captures)
    _require_distinct_ranks(numbered)
    alignments = _align(numbered, offsets)
    moves, together = _moves(numbered, alignments)
    names = Names()
    moved = [_moved(one, names, move, n) for n, (one, move) in enumerate(zip(numbered, moves, strict=True))]
    tables = {name: np.concatenate([part[name] for part in moved]) for name in moved[0]}
    utc = None if numbered[0].utc is None else numbered[0].utc - moves[0]
    whole = replace(
        numbered[0], source=" ".join(one.source for one in numbered), names=tuple(names),
        form=", ".join(dict.fromkeys(one.form for one in numbered)),
        streams={key: name for one in numbered for key, name in one.streams.items()},
        incomplete="; ".join(dict.fromkeys(one.incomplete for one in numbered if one.incomplete)),
        notes=(*dict.fromkeys(note for one in numbered for note in one.notes), *_doubts(alignments), *together),
        utc=utc if utc is not None and utc >= 0 else None,
    ).with_tables(tables).in_order()  # fmt: skip
    require_sound(whole, limits)
    return whole, [*map(str, alignments), *together]


def align(captures: Sequence[Capture], offsets: Sequence[int] = ()) -> list[Alignment]:
    """What to add to each file's times so that all are on the clock of the first, as `merge` finds it.

    Wall clocks are only as good as their synchronisation between hosts, which no trace tells.

    Raises:
        TraceError: E066 there are more or fewer offsets than files.
    """
    return _align(_numbered(captures), offsets)


def _align(captures: Sequence[Capture], offsets: Sequence[int]) -> list[Alignment]:
    sources = [one.source for one in captures]
    if offsets and len(offsets) != len(captures):
        why = f"{len(offsets)} offsets for {len(captures)} files"
        raise TraceError("E066", "traces cannot be merged", why=why, hint="give one offset in ns for each file")
    if offsets:
        return [Alignment(s, int(o), "as was given", 0) for s, o in zip(sources, offsets, strict=True)]
    clocks = [one.utc for one in captures]
    coarse = [utc - clocks[0] if utc is not None and clocks[0] is not None else None for utc in clocks]
    first = Alignment(sources[0], 0, "it is the first", 0)
    return [first, *(_one(captures[0], one, offset) for one, offset in zip(captures[1:], coarse[1:], strict=True))]


def _moves(captures: Sequence[Capture], alignments: Sequence[Alignment]) -> tuple[list[int], list[str]]:
    """What is added to each file's times so that none is negative, and a note if alignment alone asks for less."""
    lowest = [
        int(table["start"].min()) + alignment.offset
        for one, alignment in zip(captures, alignments, strict=True) for table in one.tables().values() if len(table)
    ]  # fmt: skip
    shift = max(0, -min(lowest, default=0))
    moves = [alignment.offset + shift for alignment in alignments]
    if max(map(abs, moves)) > FURTHEST:  # beyond it a sum with a time may not fit its column
        why = f"a clock would be moved by {max(moves, key=abs)} ns, the most is {FURTHEST}"
        raise TraceError("E066", "traces cannot be merged", why=why, hint="are these traces of one job?")
    return moves, [f"all times were moved by {shift} ns, so that none is negative"] if shift else []


def _doubts(alignments: Sequence[Alignment]) -> list[str]:
    """What is not certain, without the folders that files lie in: a merged trace is handed on."""
    uncertain = [a for a in alignments[1:] if not a.certain]
    return [str(replace(a, source=Path(a.source).name)) for a in uncertain]


def _one(first: Capture, other: Capture, by_clock: int | None) -> Alignment:
    differences = _end_differences(first, other)
    count = f"{len(differences)} common collectives"
    if len(differences) < _FEW:
        if by_clock is None:
            return Alignment(other.source, 0, f"nothing to align by: {count}", None)
        return Alignment(other.source, by_clock, "by wall clock", None)
    offset = int(np.median(differences))
    spread = int(np.percentile(np.abs(differences - offset), 75))
    if spread > _CERTAIN_NS and by_clock is not None:
        return Alignment(other.source, by_clock, f"by wall clock, since {count} differ by {spread} ns", None)
    return Alignment(other.source, offset, f"by {count}", spread)


def _end_differences(first: Capture, other: Capture) -> NDArray[np.int64]:
    """End on the first minus end on the other, for each collective that both have.

    Those that no rank can leave early tell more than others, and others are asked only where they are few.
    """
    from moe_eplb.analysis.roles import with_roles  # roles need ranges, which need captures

    if {*first.ranks} & {*other.ranks}:
        return np.empty(0, np.int64)  # of one rank twice nothing is common
    names = Names()
    parts = [_moved(one, names, 0, number) for number, one in enumerate((first, other))]
    tables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    both = with_roles(replace(first, names=tuple(names), streams=first.streams | other.streams).with_tables(tables))
    rows = match_collectives(both, all_wait=True).rows
    if len(rows) < _FEW:
        rows = match_collectives(both).rows
    ends = both.gpu["end"][rows]
    return ends[:, 0] - ends[:, 1] if ends.shape[1] == 2 else np.empty(0, np.int64)


def _numbered(captures: Sequence[Capture]) -> list[Capture]:
    """The captures with ranks by their order, if none states its own."""
    if len(captures) > 1 and all(one.rank_source == "counted" and len(one.ranks) == 1 for one in captures):
        return [_with_rank(one, rank) for rank, one in enumerate(captures)]
    return list(captures)


def _require_distinct_ranks(captures: Sequence[Capture]) -> None:
    seen: dict[int, str] = {}
    for one in captures:
        for rank in one.ranks:
            if rank in seen:
                why = f"rank {rank} is in {seen[rank]} and in {one.source}"
                raise TraceError("E066", "traces cannot be merged", why=why, hint="give each rank's trace once")
            seen[rank] = one.source


def _with_rank(capture: Capture, rank: int) -> Capture:
    tables: dict[str, Table] = {}
    for name, table in capture.tables().items():
        if "rank" in (table.dtype.names or ()):
            table = table.copy()
            table["rank"] = rank
        tables[name] = table
    streams = {(rank, device, stream): name for (_, device, stream), name in capture.streams.items()}
    return replace(capture, streams=streams).with_tables(tables)


def _moved(capture: Capture, names: Names, offset: int, number: int) -> dict[str, Table]:
    """The tables with times moved, texts renumbered, and processes that no other file has."""
    renumbered = np.array([*names.numbers(capture.names), c.UNKNOWN], np.int64)  # the last is what UNKNOWN leads to
    processes = np.unique(np.concatenate([table["process"] for table in capture.tables().values()]))
    tables: dict[str, Table] = {}
    for name, table in capture.tables().items():
        table = table.copy()
        open_ended = table["end"] == c.UNKNOWN if name == "ranges" else None
        for column in ("start",) if name in _UNTIMED else ("start", "end"):
            table[column] += offset
        if open_ended is not None:
            table["end"][open_ended] = c.UNKNOWN
        for column in _TEXTS.get(name, ()):
            table[column] = renumbered[table[column]]
        table["process"] = np.searchsorted(processes, table["process"]) + (number << 20)
        tables[name] = table
    return tables
