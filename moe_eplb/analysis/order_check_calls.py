"""The balancer's calls as columns, found among the ranges of a capture by a table of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.call_names import CallNames, CallRule, Source
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.ranges import RangeIndex
from moe_eplb.analysis.readers.records import FLAGS
from moe_eplb.core.events import Kind

__all__ = ["CALLED", "Found", "OwnGraphs", "find_calls"]

Indices = NDArray[np.int64]

CALLED = np.dtype(
    [
        ("start", "<i8"),
        ("end", "<i8"),  # UNKNOWN for a range that was never closed
        ("thread", "<i8"),
        ("process", "<i8"),
        ("row", "<i8"),  # in `Capture.ranges`
        ("rank", "<i4"),
        ("kind", "<i4"),
        ("layer", "<i4"),
        ("iteration", "<i4"),
        ("flags", "<i4"),  # 1 first, 2 last, 4 dynamic; UNKNOWN where the source does not say
    ]
)
_CALLS = Kind.ABORT_ITER
_AROUND = (Kind.STEP, Kind.CHECK, Kind.START_ITER, Kind.END_ITER, Kind.ABORT_ITER, Kind.CAPTURE)
"""What may have calls inside it."""


@dataclass(frozen=True)
class OwnGraphs:
    """What our own ranges tell of graphs, each of type `CALLED`, by rank and time.

    Attributes:
        captured: Ranges of captures and the calls inside them, of which nothing ran.
        replays: Calls that replay a graph.
        noted: What the device wrote down of each layer's stages in a replay.
    """

    captured: Table
    replays: Table
    noted: Table


@dataclass(frozen=True)
class Found:
    """Ranges that the table knows.

    Attributes:
        calls: Calls of the API of type `CALLED`, by rank and time; without those of captures.
        work: Ranges of the work on streams and the calls once more, by rank and time: what kernels may lie in.
            Without those that lie in another one of their kind and so tell nothing new.
        counted: What had to be counted because nothing names it: ``layers``, ``iterations``.
        graphs: Captures and replays, as our own ranges tell of them.
    """

    calls: Table
    work: Table
    counted: tuple[str, ...]
    unordered: Table
    """Marks of a device that saw work put on a stream without the wait that it needs."""
    graphs: OwnGraphs


@dataclass(frozen=True)
class _Label:
    """What a domain and a text stand for."""

    rule: CallRule
    kind: int
    layer: int
    iteration: int


def find_calls(capture: Capture, names: CallNames) -> Found:
    """The calls of every rank.

    What lies in another call or in a piece of its work is that work and no call: both may carry the same text.
    """
    found = _matched(capture, names)
    outer = _outer(found)
    captured = _captured(capture, found)
    called = (outer == c.UNKNOWN) & (found["kind"] <= _CALLS)
    calls = found[called & ~captured]
    counted = _count(calls)
    same = (outer >= 0) & (found["kind"][outer] == found["kind"])
    work = found[(found["kind"] <= Kind.SHARED_EXPERT) & ~np.isin(found["kind"], _AROUND) & ~same]
    graphs = OwnGraphs(
        found[(called & captured) | (found["kind"] == Kind.CAPTURE)], found[found["kind"] == Kind.REPLAY],
        found[found["kind"] == Kind.DEVICE_STAGE],
    )  # fmt: skip
    return Found(calls, work, counted, found[found["kind"] == Kind.UNORDERED], graphs)


def _captured(capture: Capture, found: Table) -> NDArray[np.bool_]:
    """Which rows [N] lie in a capture of their thread."""
    captures = found["row"][found["kind"] == Kind.CAPTURE]
    if not len(captures):
        return np.zeros(len(found), np.bool_)
    around = RangeIndex(capture.ranges[captures]).around(found["process"], found["start"], found["thread"])
    inside: NDArray[np.bool_] = (around >= 0) & (found["kind"] != Kind.CAPTURE)
    return inside


def _matched(capture: Capture, names: CallNames) -> Table:
    """All ranges of known kinds, with their numbers as far as they are named; whole iterations as two calls."""
    ranges = capture.ranges
    distinct, group = distinct_rows([ranges["domain"], ranges["text"]])
    labels = [_label(capture, names, domain, text) for domain, text in distinct.tolist()]
    known = np.array([label is not None for label in labels], np.bool_)
    rows = np.flatnonzero(known[group]) if len(labels) else np.empty(0, np.int64)
    found = np.zeros(len(rows), CALLED)
    for column in ("start", "end", "thread", "process", "rank"):
        found[column] = ranges[column][rows]
    found["row"], found["flags"] = rows, _flags(capture, rows)
    found["layer"] = found["iteration"] = c.UNKNOWN
    whole = np.zeros(len(rows), np.bool_)
    order = np.argsort(group[rows], kind="stable")
    edges = np.searchsorted(group[rows][order], np.arange(len(labels) + 1)).tolist()
    around = _Around(capture, names)
    for label, first, beyond in zip(labels, edges[:-1], edges[1:], strict=True):
        if label is not None:
            mine = order[first:beyond]
            found["kind"][mine], whole[mine] = label.kind, label.rule.whole
            found["layer"][mine] = around.numbers("layer", label.rule.layer, label.layer, rows[mine])
            found["iteration"][mine] = around.numbers("iteration", label.rule.iteration, label.iteration, rows[mine])
    return _sorted(np.concatenate([found, _ends(found[whole])])) if whole.any() else found


def _label(capture: Capture, names: CallNames, domain: int, text: int) -> _Label | None:
    words = capture.names[domain] if domain >= 0 else "", capture.names[text]
    for rule in names.calls:
        match = rule.match(*words)
        if match is not None:
            return _Label(rule, *match)
    return None


def _flags(capture: Capture, rows: Indices) -> Indices:
    category = capture.ranges["category"][rows]
    used, inverse = np.unique(category, return_inverse=True)
    texts = [capture.names[number] if number >= 0 else "" for number in used.tolist()]
    said = [text[len(FLAGS) :] if text.startswith(FLAGS) else "" for text in texts]
    values = [int(text) if len(text) == 1 and text in "01234567" else c.UNKNOWN for text in said]
    return np.array(values, np.int64)[inverse.reshape(-1)]


def _ends(whole: Table) -> Table:
    """The calls that end iterations which are one range each."""
    ends = whole[whole["end"] != c.UNKNOWN].copy()
    ends["start"], ends["kind"] = ends["end"], Kind.END_ITER
    found: Table = ends
    return found


def _sorted(found: Table) -> Table:
    return found[c.order_of(found, may_be_open=True)]


class _Around:
    """Numbers of layers and iterations from where a rule says that they stand."""

    def __init__(self, capture: Capture, names: CallNames) -> None:
        self._ranges = capture.ranges
        self._named = {"layer": _numbered(capture, names.layers), "iteration": _numbered(capture, names.iterations)}
        self._index: dict[str, tuple[Indices, RangeIndex]] = {}

    def numbers(self, what: str, source: Source, in_text: int, rows: Indices) -> Indices:
        """The number of each row, UNKNOWN where only counting is left."""
        found = np.full(len(rows), in_text if source is Source.GROUP else c.UNKNOWN, np.int64)
        if source is Source.PAYLOAD:
            payload = self._ranges["payload"][rows]
            found = np.where((payload >= 0) & (payload < 1 << 30), payload, c.UNKNOWN)
        if source is not Source.COUNTED and (found == c.UNKNOWN).any():
            found = np.where(found == c.UNKNOWN, self._enclosing(what, rows), found)
        return found

    def _enclosing(self, what: str, rows: Indices) -> Indices:
        if what not in self._index:
            named = np.flatnonzero(self._named[what] >= 0)
            self._index[what] = named, RangeIndex(self._ranges[named])
        named, index = self._index[what]
        asked = self._ranges[rows]
        around = index.around(asked["process"], asked["start"], asked["thread"])
        values = self._named[what][named]
        return np.where(around >= 0, values[around] if len(values) else c.UNKNOWN, c.UNKNOWN)


def _numbered(capture: Capture, patterns: Sequence[Any]) -> Indices:
    """The number in each range's text, or UNKNOWN."""
    texts, inverse = np.unique(capture.ranges["text"], return_inverse=True)
    found = [
        next((int(m[1]) for p in patterns if (m := p.search(capture.names[text])) and m[1].isascii()), c.UNKNOWN)
        for text in texts.tolist()
    ]
    return np.array(found, np.int64)[inverse.reshape(-1)]


def _outer(found: Table) -> Indices:
    """Row of the call or piece of work that each row lies in, of those the one that ends last, or UNKNOWN."""
    start, end = found["start"], found["end"]
    closes = np.where(np.isin(found["kind"], _AROUND) | (end == c.UNKNOWN), np.iinfo(np.int64).min, end)
    outer = np.full(len(found), c.UNKNOWN, np.int64)
    distinct, threads = distinct_rows([found["process"], found["thread"]])
    for group in range(len(distinct)):
        mine = np.flatnonzero(threads == group)
        latest = np.maximum.accumulate(closes[mine])
        grows = np.append(True, latest[1:] > latest[:-1])
        around = mine[np.maximum.accumulate(np.where(grows, np.arange(len(mine)), 0))]
        outer[mine[1:]] = np.where(start[mine[1:]] < latest[:-1], around[:-1], c.UNKNOWN)
    return outer


def _count(calls: Table) -> tuple[str, ...]:
    """Number what nothing names: iterations from 0, layers within one from 0 by the stages that begin."""
    counted = []
    starts = calls["kind"] == Kind.START_ITER
    if (calls["iteration"][starts] == c.UNKNOWN).any():
        counted.append("iterations")
    stage = calls["kind"] < Kind.START_ITER
    if (calls["layer"][stage] == c.UNKNOWN).any():
        counted.append("layers")
    for rank in np.unique(calls["rank"]).tolist() if counted else ():
        mine = np.flatnonzero(calls["rank"] == rank)
        begun = np.cumsum(starts[mine])
        if "iterations" in counted:
            calls["iteration"][mine] = begun - 1
        if "layers" in counted:
            _count_layers(calls, mine, begun)
    return tuple(counted)


def _count_layers(calls: Table, mine: Indices, begun: Indices) -> None:
    waits = np.cumsum(calls["kind"][mine] == Kind.START_WAIT_GPU_STAGE)
    first = np.searchsorted(begun, begun, side="left")  # the first call of the same iteration
    before = np.where(first > 0, waits[first - 1], 0)
    stage = calls["kind"][mine] < Kind.START_ITER
    calls["layer"][mine[stage]] = np.maximum(waits - before - 1, 0)[stage]
