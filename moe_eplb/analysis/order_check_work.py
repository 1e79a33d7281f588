"""Which GPU events are which work of which stage: a stage is one layer of one iteration on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.call_names import CallNames
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.conformance import DYNAMIC
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.order_check_calls import Found
from moe_eplb.analysis.order_check_flags import within_iterations
from moe_eplb.analysis.ranges import RangeIndex
from moe_eplb.core.events import Kind, by_name

__all__ = ["StageWork", "stage_work"]

Indices = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class StageWork:
    """What was put on streams for each stage with dynamic routing.

    Attributes:
        stages: The call that begins each stage [S], of type `CALLED`.
        kind: Kind of each GPU event [N], UNKNOWN for what no call, no range of ours and no table knows.
        stage: Row of its stage [N], or UNKNOWN.
        launched: When each event was asked for [N]; its start where no call is known.
        ends: When each stage's done_set_cpu_stage returned [S]; the end of time if it did not.
        holds: When each stage's done_wait_gpu_stage was called [S], likewise.
        releases: When its start_set_cpu_stage was called [S], likewise.
    """

    stages: Table
    kind: Indices
    stage: Indices
    launched: Indices
    ends: Indices
    holds: Indices
    releases: Indices

    def where(self, stage: int) -> str:
        """A stage in words."""
        rank, layer, iteration = (int(self.stages[name][stage]) for name in ("rank", "layer", "iteration"))
        return f"rank {rank}, layer {layer}, iteration {iteration}"

    def of(self, *kinds: Kind) -> Indices:
        """Rows of the GPU events of some kinds that belong to a stage."""
        return np.flatnonzero((self.stage >= 0) & np.isin(self.kind, kinds))


def stage_work(capture: Capture, found: Found, flags: NDArray[np.int64], names: CallNames, *, ours: bool) -> StageWork:
    """The stages and their work.

    In our own traces every event says what it is of. Elsewhere it is of the range around its launch, or of the kind
    that the table gives its name, and belongs to the stage that was under way at its launch; a wait to the stage that
    begins next of the layer that its range names, where that is another one: one may be taken over by the layer before.

    Args:
        flags: Flags of the calls.
        ours: The capture is our own trace.
    """
    calls = found.calls
    stages = calls[_begins(calls, flags)]
    held, released, ended = (
        _first_call(calls, stages, kind)
        for kind in (Kind.DONE_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE, Kind.DONE_SET_CPU_STAGE)
    )
    holds, ends, releases = _end(calls, held), _end(calls, ended), _start(calls, released)
    edges = Dependencies(capture)
    launched = np.where(edges.call >= 0, edges.launch_start, capture.gpu["start"])
    if ours:
        kind, stage = _said_kinds(capture), _said_stages(capture, stages)
    else:
        around = _around(capture, edges.call, found.work)
        kind = _kinds(capture, found.work, around, names)
        stage = np.where(edges.call >= 0, _stage_at(capture, stages, ends, launched), c.UNKNOWN)
        if not found.counted:  # else a range that names its layer names another one than the calls have
            waits = np.flatnonzero((kind == Kind.START_WAIT_GPU_STAGE) & (around >= 0) & (stage >= 0))
            stage[waits] = _of_their_layers(stages, stage[waits], launched[waits], found.work[around[waits]])
    return StageWork(stages, kind, stage, launched, ends, holds, releases)


def _begins(calls: Table, flags: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which calls begin a stage: not those that are illegal because the stage is under way, or no iteration is."""
    starts = (calls["kind"] == Kind.START_WAIT_GPU_STAGE) & (flags & DYNAMIC > 0)
    if (calls["kind"] == Kind.START_ITER).any():
        starts &= within_iterations(calls)
    under_way: set[tuple[int, int]] = set()
    columns = (calls[name].tolist() for name in ("rank", "layer", "kind"))
    for index, (rank, layer, kind) in enumerate(zip(*columns, strict=True)):
        if starts[index]:
            starts[index] = (rank, layer) not in under_way
            under_way.add((rank, layer))
        elif kind == Kind.DONE_SET_CPU_STAGE:
            under_way.discard((rank, layer))
        elif kind >= Kind.START_ITER:
            under_way = {one for one in under_way if one[0] != rank}
    begins: NDArray[np.bool_] = starts
    return begins


def _first_call(calls: Table, stages: Table, kind: Kind) -> Indices:
    """Row of the first call of a kind that each stage has after it began and before its layer begins again."""
    rows = np.flatnonzero(calls["kind"] == kind)
    columns = [np.concatenate([stages[name], calls[name][rows]]) for name in ("rank", "layer")]
    _, group = distinct_rows(columns)
    starts = np.concatenate([stages["start"], calls["start"][rows]])
    order = np.lexsort((starts, group))
    is_stage = order < len(stages)
    found = np.full(len(stages), c.UNKNOWN, np.int64)
    following = order[1:][is_stage[:-1] & ~is_stage[1:] & (group[order][1:] == group[order][:-1])]
    begun = order[:-1][is_stage[:-1] & ~is_stage[1:] & (group[order][1:] == group[order][:-1])]
    found[begun] = rows[following - len(stages)]
    return found


def _start(calls: Table, rows: Indices) -> Indices:
    return np.where(rows >= 0, calls["start"][rows] if len(calls) else rows, _NEVER)


def _end(calls: Table, rows: Indices) -> Indices:
    values = calls["end"][rows] if len(calls) else rows
    return np.where((rows >= 0) & (values != c.UNKNOWN), values, _NEVER)


def _said_kinds(capture: Capture) -> Indices:
    used, inverse = np.unique(capture.gpu["name"], return_inverse=True)
    kinds = [by_name(capture.names[name]) for name in used.tolist()]
    return np.array([c.UNKNOWN if kind is None else int(kind) for kind in kinds], np.int64)[inverse.reshape(-1)]


def _said_stages(capture: Capture, stages: Table) -> Indices:
    gpu, count = capture.gpu, len(stages)
    columns = [np.concatenate([stages[name], gpu[name]]) for name in ("rank", "layer", "iteration")]
    distinct, group = distinct_rows(columns)
    of_group = np.full(len(distinct), c.UNKNOWN, np.int64)
    of_group[group[:count]] = np.arange(count)
    return of_group[group[count:]]


def _around(capture: Capture, call: Indices, work: Table) -> Indices:
    """For each GPU event [N], launched by a `call`, the row of the innermost range of known kind around that."""
    found = np.full(len(call), c.UNKNOWN, np.int64)
    asked = np.flatnonzero(call >= 0)
    if len(asked) and len(work):
        calls = capture.calls[call[asked]]
        index = RangeIndex(capture.ranges[work["row"]])
        found[asked] = index.around(calls["process"], calls["start"], calls["thread"])
    return found


def _kinds(capture: Capture, work: Table, around: Indices, names: CallNames) -> Indices:
    """By the range around, else by name."""
    used, inverse = np.unique(capture.gpu["name"], return_inverse=True)
    named = [names.by_kernel(capture.names[name]) for name in used.tolist()]
    kinds = np.array([c.UNKNOWN if kind is None else int(kind) for kind in named], np.int64)[inverse.reshape(-1)]
    inside = np.flatnonzero(around >= 0)
    kinds[inside] = work["kind"][around[inside]]
    return kinds


def _stage_at(capture: Capture, stages: Table, ends: Indices, launched: Indices) -> Indices:
    """The stage of each event's process that had begun last before its launch and had not ended."""
    found = np.full(len(launched), c.UNKNOWN, np.int64)
    for process in np.unique(stages["process"]).tolist():
        begun = np.flatnonzero(stages["process"] == process)
        begun = begun[np.argsort(stages["start"][begun], kind="stable")]
        mine = np.flatnonzero(capture.gpu["process"] == process)
        at = np.searchsorted(stages["start"][begun], launched[mine], side="right") - 1
        stage = np.where(at >= 0, begun[np.maximum(at, 0)], c.UNKNOWN)
        under_way = (stage >= 0) & (launched[mine] <= ends[stage])
        found[mine] = np.where(under_way, stage, c.UNKNOWN)
    return found


def _of_their_layers(stages: Table, stage: Indices, launched: Indices, named: Table) -> Indices:
    """The stages [N] of waits once more: the next one of the layer that is `named` [N], where it is another layer's."""
    found = stage.copy()
    other = np.flatnonzero((named["layer"] >= 0) & (named["layer"] != stages["layer"][stage]))
    pairs = np.stack([named["process"][other], named["layer"][other]], axis=1)
    for process, layer in np.unique(pairs, axis=0).tolist():
        mine = other[(pairs == (process, layer)).all(axis=1)]
        begun = np.flatnonzero((stages["process"] == process) & (stages["layer"] == layer))
        begun = begun[np.argsort(stages["start"][begun], kind="stable")]
        at = np.searchsorted(stages["start"][begun], launched[mine])
        following = np.append(begun, c.UNKNOWN)[at]
        fits = (following >= 0) & (stages["iteration"][following] == named["iteration"][mine])
        found[mine] = np.where(fits, following, stage[mine])
    return found
