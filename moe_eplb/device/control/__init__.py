"""The balancer's steps that the device does by itself: plain torch, and on a GPU Triton kernels that equal it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from moe_eplb.device.control import plain, plain_all
from moe_eplb.device.control.stack import LayerStack
from moe_eplb.device.control.state import LANES, LayerState, ModelState, Outcome, Report, Stage

__all__ = [
    "LANES",
    "LayerStack",
    "LayerState",
    "ModelState",
    "Outcome",
    "Report",
    "Stage",
    "fold",
    "hand_over",
    "hand_over_all",
    "look_ahead",
    "settle",
    "settle_and_fold",
    "settle_and_fold_all",
    "take_over",
    "vote",
    "vote_all",
    "vote_and_fold",
]


def _for(model: ModelState) -> ModuleType:
    if not model.turn.is_cuda:
        return plain
    from moe_eplb.device.control import triton_control  # Triton is there wherever torch has a GPU

    return triton_control


def _for_all(model: ModelState) -> ModuleType:
    if not model.turn.is_cuda:
        return plain_all
    from moe_eplb.device.control import triton_all

    return triton_all


def look_ahead(model: ModelState) -> None:
    """See `plain.look_ahead`."""
    _for(model).look_ahead(model)


def take_over(model: ModelState, layer: LayerState) -> None:
    """See `plain.take_over`."""
    _for(model).take_over(model, layer)


def vote(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int] | None,
) -> None:  # fmt: skip
    """See `plain.vote`."""
    _for(model).vote(model, layer, following, timeout_ns=timeout_ns, wait=wait)


def settle(model: ModelState, following: LayerState, lanes: Tensor, *, ranks: int) -> None:
    """See `plain.settle`."""
    _for(model).settle(model, following, lanes, ranks=ranks)


def fold(model: ModelState, layer: LayerState, counts: Tensor, *, decay: float) -> None:
    """See `plain.fold`."""
    _for(model).fold(model, layer, counts, decay=decay)


def settle_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, message: Tensor, *, ranks: int, decay: float
) -> None:
    """See `plain.settle_and_fold`."""
    _for(model).settle_and_fold(model, layer, following, message, ranks=ranks, decay=decay)


def vote_and_fold(
    model: ModelState, layer: LayerState, following: LayerState, *, timeout_ns: int,
    wait: Callable[[int, int, int], int] | None, decay: float,
) -> None:  # fmt: skip
    """See `plain.vote_and_fold`."""
    _for(model).vote_and_fold(model, layer, following, timeout_ns=timeout_ns, wait=wait, decay=decay)


def hand_over(model: ModelState, layer: LayerState, *, delay: int) -> None:
    """See `plain.hand_over`."""
    _for(model).hand_over(model, layer, delay=delay)


def vote_all(
    model: ModelState, stack: LayerStack, *, timeout_ns: int, wait: Callable[[int, int, int], int] | None
) -> None:  # fmt: skip
    """See `plain_all.vote_all`."""
    _for_all(model).vote_all(model, stack, timeout_ns=timeout_ns, wait=wait)


def settle_and_fold_all(model: ModelState, stack: LayerStack, *, ranks: int, decay: float) -> None:
    """See `plain_all.settle_and_fold_all`."""
    _for_all(model).settle_and_fold_all(model, stack, ranks=ranks, decay=decay)


def hand_over_all(model: ModelState, stack: LayerStack, *, delay: int) -> None:
    """See `plain_all.hand_over_all`."""
    _for_all(model).hand_over_all(model, stack, delay=delay)
