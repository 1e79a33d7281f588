"""The balancer's steps that the device does by itself: plain torch, and on a GPU Triton kernels that equal it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from moe_eplb.device.control import plain
from moe_eplb.device.control.state import LANES, LayerState, ModelState, Outcome, Report, Stage

__all__ = [
    "LANES",
    "LayerState",
    "ModelState",
    "Outcome",
    "Report",
    "Stage",
    "fold",
    "hand_over",
    "settle",
    "settle_and_fold",
    "take_over",
    "vote",
]


def _for(model: ModelState) -> ModuleType:
    if not model.turn.is_cuda:
        return plain
    from moe_eplb.device.control import triton_control  # Triton is there wherever torch has a GPU

    return triton_control


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


def hand_over(model: ModelState, layer: LayerState, *, delay: int) -> None:
    """See `plain.hand_over`."""
    _for(model).hand_over(model, layer, delay=delay)
