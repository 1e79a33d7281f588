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
from moe_eplb.device.sanitizer import declares

__all__ = ["begin", "block_of", "fold", "hand_over", "settle", "settle_and_fold", "take_over", "vote"]

_REPORT = tl.constexpr(REPORT)
_LANES = tl.constexpr(LANES)
_LANES_BLOCK = tl.constexpr(triton.next_power_of_2(LANES))


def begin(model: ModelState, row: Tensor) -> None:
    """See `plain.begin`. Not by a copy, which waits in the copy engine for weights that are in front of it."""
    _begin[(1,)](model.turn, row, row.numel(), block=block_of(row.numel()), num_warps=1)


def take_over(model: ModelState, layer: LayerState) -> None:
    """See `plain.take_over`."""
    tables, cells = layer.tables.numel(), layer.cells.numel()
    _take_over[(1,)](
        model.turn, model.due, model.decision, model.stages, model.reports, model.committed, layer.pending,
        layer.tables, layer.cells, layer.counts, layer.layer, model.layers, model.reports.shape[0], tables, cells,
        layer.experts, block=block_of(max(layer.experts, tables + cells)), num_warps=4,
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
        early=False, num_warps=1,
    )  # fmt: skip


def settle(model: ModelState, following: LayerState, lanes: Tensor, *, ranks: int) -> None:
    """See `plain.settle`."""
    _settle[(1,)](
        model.turn, model.due, model.decision, model.reports, lanes, lanes.stride(0), following.layer,
        model.layers, model.reports.shape[0], ranks, rows=lanes.shape[0], early=False, num_warps=1,
    )  # fmt: skip


def fold(model: ModelState, layer: LayerState, counts: Tensor, *, decay: float) -> None:
    """See `plain.fold`."""
    _fold[(1,)](
        model.turn, model.stages, counts, counts.stride(0), layer.load, layer.recent, layer.folded, layer.reduced,
        decay, layer.layer, layer.experts, rows=counts.shape[0], window=layer.recent.shape[0],
        block=block_of(layer.experts), num_warps=4, enable_fp_fusion=False,
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


def hand_over(model: ModelState, layer: LayerState, *, delay: int) -> None:
    """See `plain.hand_over`."""
    _hand_over[(1,)](
        model.turn, model.due, model.decision, model.stages, model.rung, model.bell, layer.load, layer.handed_load,
        layer.handed, layer.layer, layer.experts, delay, block=block_of(layer.experts), releases=model.turn.is_cuda,
        num_warps=4,
    )  # fmt: skip


def block_of(size: int) -> int:
    """Entries of the block that holds `size` values."""
    return max(16, int(triton.next_power_of_2(size)))


@declares(writes=["turn"])
@triton.jit(do_not_specialize=["count"])
def _begin(turn, row, count, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(turn + at, tl.load(row + at, mask=at < count, volatile=True), mask=at < count)


@declares(writes=["due", "decision", "stages", "reports", "committed", "tables", "cells", "counts"], words=["pending"])
@triton.jit(do_not_specialize=["layer", "layers", "kept", "tables_size", "cells_size", "experts"])
def _take_over(
    turn, due, decision, stages, reports, committed, pending, tables, cells, counts, layer, layers, kept, tables_size,
    cells_size, experts, block: tl.constexpr,
):  # fmt: skip
    iteration = tl.load(turn)
    at_due = tl.load(due + layer)
    ends = (at_due >= 0) & (at_due <= iteration)
    commits = ends & (at_due == iteration) & (tl.load(decision + layer) == 1)
    at = tl.arange(0, block)
    value = tl.load(pending + at, mask=(at < tables_size + cells_size) & commits, other=0)
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
    prepared = tl.load(ready + following, volatile=True)
    waited = tl.zeros([], dtype=tl.int64)
    if spin:
        limit = tl.where(tl.load(overdue) == 0, timeout_ns, 0).to(tl.int64)
        begin = globaltimer()
        while carried & (prepared < at_due) & (waited < limit):
            prepared = tl.atomic_add(ready + following, 0, sem="acquire", scope="sys")
            waited = (globaltimer() - begin).to(tl.int64)
            if early:  # programs of other layers wait beside this one: the first wait in vain ends all of them
                limit = tl.where(tl.load(overdue, volatile=True) == 0, limit, 0)
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
    tl.store(overflow + layer, iteration + 1, mask=tl.min(count, axis=0) < 0)
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


@declares(writes=["stages", "load", "recent", "folded", "reduced"])
@triton.jit(do_not_specialize=["stride", "decay", "layer", "experts"])
def _fold(
    turn, stages, counts, stride, load, recent, folded, reduced, decay, layer, experts, rows: tl.constexpr,
    window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    counting = tl.load(turn + 1) != 0
    expert = tl.arange(0, block)
    mask = (expert < experts) & counting
    total = tl.zeros([block], dtype=tl.int64)
    for row in range(rows):
        total += tl.load(counts + row * stride + expert, mask=mask, other=0).to(tl.int64)
    done = tl.load(folded)
    newest = done % window
    summed = total
    filled = tl.minimum(done + 1, window)
    for place in range(window):
        summed += tl.load(recent + place * experts + expert, mask=mask & (place != newest) & (place < filled), other=0)
    sample = tl.div_rn(summed.to(tl.float32), filled.to(tl.float32))
    decayed = tl.load(load + expert, mask=mask, other=0.0) * decay
    tl.store(load + expert, decayed + sample, mask=mask)
    tl.store(recent + newest * experts + expert, total, mask=mask)
    tl.store(reduced + expert, total, mask=mask)
    tl.store(stages + layer * 4 + 2, tl.load(turn))
    tl.debug_barrier()
    tl.store(folded, done + 1, mask=counting)


@declares(writes=["decision", "reports", "stages", "load", "recent", "folded", "reduced"])
@triton.jit(do_not_specialize=["decay", "layer", "following", "layers", "kept", "ranks", "experts"])
def _settle_and_fold(
    turn, due, decision, reports, stages, message, load, recent, folded, reduced, decay, layer, following, layers, kept,
    ranks, experts, window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    _settle(turn, due, decision, reports, message + experts, 0, following, layers, kept, ranks, 1, False)
    _fold(turn, stages, message, 0, load, recent, folded, reduced, decay, layer, experts, 1, window, block)


@declares(writes=["due", "decision", "stages", "rung", "bell", "load", "handed_load", "handed"])
@triton.jit(do_not_specialize=["layer", "experts", "delay"])
def _hand_over(
    turn, due, decision, stages, rung, bell, load, handed_load, handed, layer, experts, delay, block: tl.constexpr,
    releases: tl.constexpr,
):  # fmt: skip
    iteration = tl.load(turn)
    tl.store(stages + layer * 4 + 3, iteration)
    if tl.load(turn + 2 + layer) != 0:
        gives = tl.load(due + layer) < 0
        expert = tl.arange(0, block)
        mask = (expert < experts) & gives
        tl.store(handed_load + expert, tl.load(load + expert, mask=mask, other=0.0), mask=mask)
        tl.store(handed, iteration, mask=gives)
        count = tl.load(rung) + 1
        tl.debug_barrier()  # the load is read, and what the host shall see is on its way
        tl.store(load + expert, tl.zeros([block], dtype=tl.float32), mask=mask)
        tl.store(due + layer, iteration + delay, mask=gives)
        tl.store(decision + layer, -1, mask=gives)
        tl.store(rung, count)
        if releases:
            _ring(bell, count)
        else:  # the interpreter has no machine instructions, and its host runs it in the order that is written here
            tl.store(bell, count)


@triton.jit
def _ring(bell, count):
    """Store `count` in host memory, seen there after all that the program has stored before its last barrier.

    Not by an atomic exchange: on GPUs that reach the host over PCIe, atomic operations of the system's scope on host
    memory are not supported (`hostNativeAtomicSupported` is 0; memcheck refuses them), and none is needed, for nobody
    else writes the word. A store that releases is ordered alike. One thread makes it.
    """
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.u32 [$1], $2;
            mov.u32 $0, $2;
        }
        """,
        "=r,l,r,~{memory}", [bell.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
