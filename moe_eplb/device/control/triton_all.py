"""The steps of all layers at the end of an iteration as one kernel each; see `plain_all` for what they do.

A launch for each layer would take longer than what it does, and the next iteration waits for the last of them.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl

from moe_eplb.device.control.stack import LayerStack
from moe_eplb.device.control.state import LANES, ModelState
from moe_eplb.device.control.triton_control import _settle, _vote
from moe_eplb.device.control.triton_load import _add_to_load, _hand_over, block_of
from moe_eplb.device.sanitizer import declares

__all__ = ["hand_over_all", "settle_and_fold_all", "vote_all"]

_LANES = tl.constexpr(LANES)


def vote_all(
    model: ModelState, stack: LayerStack, *, timeout_ns: int, wait: Callable[[int, int, int], int] | None = None
) -> None:  # fmt: skip
    """See `plain_all.vote_all`; without `wait` the kernel itself waits.

    A program for each layer, which wait beside each other, so that all of them take as long as the longest. `overdue`
    has many writers that write the same; a program that begins late, or waits when another has given up, sees it.
    """
    if wait is not None:  # see `triton_control.vote`
        ends = int(model.turn[0]) + 1
        for layer in (model.due == ends).nonzero().flatten().tolist():
            wait(layer, ends, 0 if int(model.overdue) else timeout_ns)
    _vote_all[(stack.layers,)](
        model.turn, model.due, model.decision, model.ready, model.overdue, model.stages, model.reports, model.overflow,
        stack.counts, stack.lanes, stack.message, stack.layers, model.reports.shape[0], stack.experts, timeout_ns,
        block=block_of(stack.experts), spin=wait is None, num_warps=1,
    )  # fmt: skip


def settle_and_fold_all(model: ModelState, stack: LayerStack, *, ranks: int, decay: float) -> None:
    """See `plain_all.settle_and_fold_all`; a program for each layer."""
    _settle_and_fold_all[(stack.layers,)](
        model.turn, model.due, model.decision, model.reports, model.stages, stack.message, stack.load, stack.recent,
        stack.folded, stack.reduced, decay, stack.layers, model.reports.shape[0], ranks, stack.experts,
        window=stack.recent.shape[1], block=block_of(stack.experts), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def hand_over_all(model: ModelState, stack: LayerStack, *, delay: int) -> None:
    """See `plain_all.hand_over_all`; one program, since the host knows by the order of rings whose each one is."""
    _hand_over_all[(1,)](
        model.turn, model.due, model.decision, model.stages, model.rung, model.bell, stack.load, stack.handed_load,
        stack.handed, stack.layers, stack.experts, delay, block=block_of(stack.experts), releases=model.turn.is_cuda,
        num_warps=4,
    )  # fmt: skip


@declares(
    writes=["overdue", "stages", "reports", "overflow", "message"], words=["ready", "overdue", "lanes"],
    stacked=["counts"],
)  # fmt: skip
@triton.jit(do_not_specialize=["layers", "kept", "experts", "timeout_ns"])
def _vote_all(
    turn, due, decision, ready, overdue, stages, reports, overflow, counts, lanes, message, layers, kept, experts,
    timeout_ns, block: tl.constexpr, spin: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    _vote(
        turn, due, decision, ready, overdue, stages, reports, overflow, counts + layer * experts,
        lanes + layer * _LANES, message + layer * (experts + _LANES), layer, layer, layers, kept, experts, timeout_ns,
        block, spin, True,
    )  # fmt: skip


@declares(writes=["decision", "reports", "stages", "load", "recent", "folded", "reduced"])
@triton.jit(do_not_specialize=["decay", "layers", "kept", "ranks", "experts"])
def _settle_and_fold_all(
    turn, due, decision, reports, stages, message, load, recent, folded, reduced, decay, layers, kept, ranks, experts,
    window: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    row = message + layer * (experts + _LANES)
    _settle(turn, due, decision, reports, row + experts, 0, layer, layers, kept, ranks, 1, True)
    _add_to_load(
        turn, stages, row, 0, load + layer * experts, recent + layer * window * experts, folded + layer,
        reduced + layer * experts, decay, layer, experts, 1, window, block,
    )  # fmt: skip


@declares(writes=["due", "decision", "stages", "rung", "bell", "load", "handed_load", "handed"])
@triton.jit(do_not_specialize=["experts", "delay"])
def _hand_over_all(
    turn, due, decision, stages, rung, bell, load, handed_load, handed, layers: tl.constexpr, experts, delay,
    block: tl.constexpr, releases: tl.constexpr,
):  # fmt: skip
    for layer in tl.range(0, layers, num_stages=1):
        _hand_over(
            turn, due, decision, stages, rung, bell, load + layer * experts, handed_load + layer * experts,
            handed + layer, layer, experts, delay, block, releases,
        )  # fmt: skip
        tl.debug_barrier()  # the next layer reads how often the bell was rung
