"""The balancer's steps on the device as Triton kernels of one program each; see `plain` for what they do.

The kernels are tiny: they exist so that an iteration needs no look by the host and fits into a CUDA graph.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from moe_eplb.device.control.state import LANES, REPORT, LayerState, ModelState
from moe_eplb.device.control.triton_load import _add_to_load, block_of, fold, hand_over
from moe_eplb.device.sanitizer import declares

__all__ = ["fold", "hand_over", "look_ahead", "settle", "settle_and_fold", "take_over", "vote", "vote_and_fold"]

_REPORT = tl.constexpr(REPORT)
_LANES = tl.constexpr(LANES)
_LANES_BLOCK = tl.constexpr(triton.next_power_of_2(LANES))


def look_ahead(model: ModelState) -> None:
    """See `plain.look_ahead`."""
    width = model.turn.numel()
    _look_ahead[(1,)](
        model.turns, model.turn, model.coming, width, model.turns.shape[0], block=block_of(width),
        acquires=model.turn.is_cuda, num_warps=1,
    )  # fmt: skip


def take_over(model: ModelState, layer: LayerState) -> None:
    """See `plain.take_over`."""
    tables, cells = layer.tables.numel(), layer.cells.numel()
    sizes = (layer.experts, tables + cells, *([2 + model.layers] if layer.layer == 0 else []))
    _take_over[(1,)](
        model.turns, model.turn, model.coming, model.begun, model.due, model.decision, model.stages, model.reports,
        model.committed, layer.pending, layer.tables, layer.cells, layer.counts, layer.layer, model.layers,
        model.reports.shape[0], tables, cells, layer.experts, block=block_of(max(sizes)), begins=layer.layer == 0,
        num_warps=8,
    )  # fmt: skip


def vote(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int] | None = None,
) -> None:  # fmt: skip
    """See `plain.vote`; without `wait` the kernel itself waits."""
    if wait is not None:  # the interpreter has no clock of the device: what the kernel would wait for is awaited before
        wait(following.layer, int(model.due[following.layer]), timeout_ns)
    _vote[(1,)](
        model.turn, model.due, model.decision, model.ready, model.overdue, model.stages, model.reports, model.overflow,
        layer.counts, following.lanes, layer.message, layer.layer, following.layer, model.layers,
        model.reports.shape[0], layer.experts, timeout_ns, block=block_of(layer.experts), spin=wait is None,
        early=False, num_warps=4,
    )  # fmt: skip


def settle(model: ModelState, following: LayerState, lanes: Tensor, *, ranks: int) -> None:
    """See `plain.settle`."""
    _settle[(1,)](
        model.turn, model.due, model.decision, model.reports, lanes, lanes.stride(0), following.layer,
        model.layers, model.reports.shape[0], ranks, rows=lanes.shape[0], early=False, num_warps=1,
    )  # fmt: skip


def settle_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, message: Tensor, *, ranks: int, decay: float
) -> None:
    """See `plain.settle_and_fold`; one launch instead of two."""
    _settle_and_fold[(1,)](
        model.turn, model.due, model.decision, model.reports, model.stages, message, layer.load, layer.recent,
        layer.folded, layer.reduced, decay, layer.layer, following.layer, model.layers, model.reports.shape[0], ranks,
        layer.experts, window=layer.recent.shape[0], block=block_of(layer.experts), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def vote_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int] | None = None, decay: float,
) -> None:  # fmt: skip
    """See `plain.vote_and_fold`; one launch, which a short kernel of the model beside it hides where two would not."""
    if wait is not None:  # see `vote`
        wait(following.layer, int(model.due[following.layer]), timeout_ns)
    _vote_and_fold[(1,)](
        model.turn, model.due, model.decision, model.ready, model.overdue, model.stages, model.reports, model.overflow,
        layer.counts, following.lanes, layer.message, layer.load, layer.recent, layer.folded, layer.reduced, decay,
        layer.layer, following.layer, model.layers, model.reports.shape[0], layer.experts, timeout_ns,
        window=layer.recent.shape[0], block=block_of(layer.experts), spin=wait is None, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


@declares(
    writes=["turn", "begun", "due", "decision", "stages", "reports", "committed", "tables", "cells", "counts"],
    words=["pending"],
)
@triton.jit(do_not_specialize=["layer", "layers", "kept", "tables_size", "cells_size", "experts"])
def _take_over(
    turns, turn, coming, begun, due, decision, stages, reports, committed, pending, tables, cells, counts, layer,
    layers, kept, tables_size, cells_size, experts, block: tl.constexpr, begins: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, block)
    # Read before the row is, which may have to come from the host.
    iteration, at_due, agreed = tl.load(turn), tl.load(due + layer), tl.load(decision + layer) == 1
    value = tl.load(pending + at, mask=(at < tables_size + cells_size) & agreed, other=0)
    if begins:
        iteration = _begin(turns, turn, coming, begun, iteration, 2 + layers, kept, block)
    ends = (at_due >= 0) & (at_due <= iteration)
    commits = ends & (at_due == iteration) & agreed
    tl.store(tables + at, value, mask=(at < tables_size) & commits)
    tl.store(cells + at - tables_size, value, mask=(at >= tables_size) & (at < tables_size + cells_size) & commits)
    tl.store(counts + at, tl.zeros([block], dtype=tl.int32), mask=at < experts)
    report = reports + ((at_due % kept) * layers + layer) * _REPORT
    tl.store(report, at_due, mask=ends)
    tl.store(report + 5, tl.where(commits, 1, 2).to(tl.int64), mask=ends)
    tl.store(report + 6, iteration, mask=ends)
    tl.store(committed + layer, at_due, mask=commits)
    tl.store(stages + layer * 4, iteration)
    tl.debug_barrier()  # every thread has read these before one of them changes them
    tl.store(due + layer, -1, mask=ends)
    tl.store(decision + layer, -1, mask=ends)


@triton.jit
def _begin(turns, turn, coming, begun, last, width, kept, block: tl.constexpr):
    """Take the row of the iteration behind `last` where it is there; the iteration under way."""
    at = tl.arange(0, block)
    ahead = tl.load(coming + at, mask=at < width, other=0)
    seen = tl.load(coming) == last + 1
    theirs = turns + (last + 1) % kept * width
    number = tl.load(theirs, mask=seen == 0, other=0, volatile=True)
    row = tl.load(theirs + at, mask=(at < width) & (seen == 0), other=0, volatile=True)
    row, written = tl.where(seen, ahead, row), seen | (number == last + 1)
    tl.debug_barrier()  # every thread has read the last iteration before one of them changes it
    tl.store(turn + at, row, mask=(at < width) & written)
    tl.store(begun, last + 1, mask=written)
    return tl.where(written, last + 1, last)


@declares(writes=["coming"])
@triton.jit(do_not_specialize=["width", "kept"])
def _look_ahead(turns, turn, coming, width, kept, block: tl.constexpr, acquires: tl.constexpr):
    following = tl.load(turn) + 1
    theirs, at = turns + following % kept * width, tl.arange(0, block)
    # The number, which the host writes last: each thread reads it before its part of the row, and all go by the oldest
    # that one has read. The interpreter has no machine instructions.
    numbers = theirs + tl.zeros([block], dtype=tl.int64)
    number = tl.min(_acquired(numbers) if acquires else tl.load(numbers, volatile=True), axis=0)
    there = number == following
    row = tl.load(theirs + at, mask=(at < width) & there, other=0, volatile=True)
    tl.store(coming + at, row, mask=(at < width) & there)


@triton.jit
def _acquired(word):
    """A word of 64 bits, behind which whatever was published before it can be read.

    Each thread loads it and none waits for another, as all would with an atomic operation, so that the warps of a
    program end their wait apart. What comes of it is written by the first warp alone: stores of single values, and of
    blocks of no more elements than a warp has threads, are made once, by the threads that hold them first. Should
    threads of that warp part where the time is just over, the vote would be a torn one: the ranks see digests that
    differ, and drop the plan.
    """
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.s64 $0, [$1];", "=l,l,~{memory}", [word.to(tl.int64)], dtype=tl.int64, is_pure=False,
        pack=1,
    )  # fmt: skip


@declares(writes=["overdue", "stages", "reports", "overflow", "message"], words=["ready", "overdue", "lanes"])
@triton.jit(do_not_specialize=["layer", "following", "layers", "kept", "experts", "timeout_ns"])
def _vote(
    turn, due, decision, ready, overdue, stages, reports, overflow, counts, lanes, message, layer, following, layers,
    kept, experts, timeout_ns, block: tl.constexpr, spin: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    iteration = tl.load(turn)
    at_due = tl.load(due + following)
    expected = _due_of_next(iteration, following, early)
    carried = (at_due == expected) & (tl.load(decision + following) == -1)
    waited = tl.zeros([], dtype=tl.int64)
    if spin:
        prepared = at_due - 1
        limit = tl.where(tl.load(overdue) == 0, timeout_ns, 0).to(tl.int64)
        begin = globaltimer()
        while carried & (prepared < at_due) & (waited <= limit):  # where nobody waits any more, it is looked at once
            prepared = _acquired(ready + following)
            waited = tl.where(prepared < at_due, (globaltimer() - begin).to(tl.int64), waited)
            if early:  # programs of other layers wait beside this one: the first wait in vain ends all of them
                limit = tl.where(tl.load(overdue, volatile=True) == 0, limit, 0)
    else:
        prepared = tl.load(ready + following, volatile=True)
    voted = carried & (prepared >= at_due)
    tl.store(overdue, 1, mask=carried & (prepared < at_due))
    report = reports + ((at_due % kept) * layers + following) * _REPORT
    tl.store(report, at_due, mask=carried)
    tl.store(report + 1, voted.to(tl.int64), mask=carried)
    tl.store(report + 2, waited, mask=carried)
    tl.store(report + 5, 0, mask=carried)
    lane = tl.arange(0, _LANES_BLOCK)
    mine = tl.load(lanes + lane, mask=(lane < _LANES) & voted, other=0, volatile=True)
    tl.store(message + experts + lane, mine, mask=lane < _LANES)
    expert = tl.arange(0, block)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    tl.store(message + expert, count.to(tl.int64), mask=expert < experts)
    # Not by the least of them, for which the warps would wait for each other.
    told = tl.zeros([block], dtype=tl.int64)
    tl.store(overflow + layer + told, told + iteration + 1, mask=(expert < experts) & (count < 0))
    tl.store(stages + layer * 4 + 1, iteration)


@declares(writes=["decision", "reports"])
@triton.jit(do_not_specialize=["stride", "following", "layers", "kept", "ranks"])
def _settle(
    turn, due, decision, reports, lanes, stride, following, layers, kept, ranks, rows: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    iteration = tl.load(turn)
    at_due = tl.load(due + following)
    carried = (at_due == _due_of_next(iteration, following, early)) & (tl.load(decision + following) == -1)
    ready = _sum_lane(lanes, stride, rows)
    high, high2 = _sum_lane(lanes + 1, stride, rows), _sum_lane(lanes + 2, stride, rows)
    low, low2 = _sum_lane(lanes + 3, stride, rows), _sum_lane(lanes + 4, stride, rows)
    differ = (ready * high2 != high * high) | (ready * low2 != low * low)
    report = reports + ((at_due % kept) * layers + following) * _REPORT
    tl.store(report + 3, ready, mask=carried)
    tl.store(report + 4, differ.to(tl.int64), mask=carried)
    tl.store(report + 7, iteration, mask=carried)
    tl.debug_barrier()
    tl.store(decision + following, ((ready == ranks) & (differ == 0)).to(tl.int64), mask=carried)


@triton.jit
def _due_of_next(iteration, following, early: tl.constexpr):
    """See `plain._due_of_next`."""
    return iteration + 1 if early else iteration + (following == 0).to(tl.int64)


@triton.jit
def _sum_lane(lane, stride, rows: tl.constexpr):
    total = tl.zeros([], dtype=tl.int64)
    for row in range(rows):
        total += tl.load(lane + row * stride)
    return total


@declares(writes=["decision", "reports", "stages", "load", "recent", "folded", "reduced"])
@triton.jit(do_not_specialize=["decay", "layer", "following", "layers", "kept", "ranks", "experts"])
def _settle_and_fold(
    turn, due, decision, reports, stages, message, load, recent, folded, reduced, decay, layer, following, layers, kept,
    ranks, experts, window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    _settle(turn, due, decision, reports, message + experts, 0, following, layers, kept, ranks, 1, False)
    _add_to_load(turn, stages, message, 0, load, recent, folded, reduced, decay, layer, experts, 1, window, block)


@declares(
    writes=[
        "decision", "overdue", "stages", "reports", "overflow", "message", "load", "recent", "folded", "reduced",
    ],
    words=["ready", "overdue", "lanes"],
)  # fmt: skip
@triton.jit(do_not_specialize=["decay", "layer", "following", "layers", "kept", "experts", "timeout_ns"])
def _vote_and_fold(
    turn, due, decision, ready, overdue, stages, reports, overflow, counts, lanes, message, load, recent, folded,
    reduced, decay, layer, following, layers, kept, experts, timeout_ns, window: tl.constexpr, block: tl.constexpr,
    spin: tl.constexpr,
):  # fmt: skip
    _vote(
        turn, due, decision, ready, overdue, stages, reports, overflow, counts, lanes, message, layer, following,
        layers, kept, experts, timeout_ns, block, spin, False,
    )  # fmt: skip
    tl.debug_barrier()  # what is settled is the vote that the first warp has written, whenever others ended their wait
    _settle(turn, due, decision, reports, message + experts, 0, following, layers, kept, 1, 1, False)
    _add_to_load(turn, stages, counts, 0, load, recent, folded, reduced, decay, layer, experts, 1, window, block)
