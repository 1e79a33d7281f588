"""What becomes of a layer's load on the device: counts are folded in, and it is handed over. See `triton_control`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.control.state import LayerState, ModelState
from moe_eplb.device.sanitizer import declares

__all__ = ["block_of", "fold", "hand_over"]


def fold(model: ModelState, layer: LayerState, counts: Tensor, *, decay: float) -> None:
    """See `plain.fold`."""
    _fold[(1,)](
        model.turn, model.stages, model.overflow, counts, counts.stride(0), layer.load, layer.recent, layer.folded,
        layer.reduced, decay, layer.layer, layer.experts, rows=counts.shape[0], window=layer.recent.shape[0],
        block=block_of(layer.experts), num_warps=4, enable_fp_fusion=False,
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


@declares(writes=["stages", "overflow", "load", "recent", "folded", "reduced"])
@triton.jit(do_not_specialize=["stride", "decay", "layer", "experts"])
def _fold(
    turn, stages, overflow, counts, stride, load, recent, folded, reduced, decay, layer, experts, rows: tl.constexpr,
    window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, block)
    least = tl.zeros([block], dtype=tl.int64)
    for row in range(rows):
        count = tl.load(counts + row * stride + expert, mask=expert < experts, other=0)
        least = tl.minimum(least, count.to(tl.int64))
    tl.store(overflow + layer, tl.load(turn) + 1, mask=tl.min(least, axis=0) < 0)
    _add_to_load(
        turn, stages, counts, stride, load, recent, folded, reduced, decay, layer, experts, rows, window, block
    )


@triton.jit
def _add_to_load(
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


@declares(writes=["due", "decision", "stages", "rung", "bell", "load", "handed_load", "handed"])
@triton.jit(do_not_specialize=["layer", "experts", "delay"])
def _hand_over(
    turn, due, decision, stages, rung, bell, load, handed_load, handed, layer, experts, delay, block: tl.constexpr,
    releases: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, block)
    # All is read at once, also for a layer whose turn it is not: one after the other would take three times as long.
    iteration, asked, gives = tl.load(turn), tl.load(turn + 2 + layer) != 0, tl.load(due + layer) < 0
    given, count = tl.load(load + expert, mask=expert < experts, other=0.0), tl.load(rung) + 1
    tl.store(stages + layer * 4 + 3, iteration)
    if asked:
        mask = (expert < experts) & gives
        tl.store(handed_load + expert, given, mask=mask)
        tl.store(handed, iteration, mask=gives)
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
