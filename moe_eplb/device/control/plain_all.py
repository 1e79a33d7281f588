"""The steps of all layers at the end of an iteration in plain torch: each layer's own, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from moe_eplb.device.control import plain
from moe_eplb.device.control.stack import LayerStack
from moe_eplb.device.control.state import ModelState

__all__ = ["hand_over_all", "settle_and_fold_all", "vote_all"]


def vote_all(
    model: ModelState, stack: LayerStack, *, timeout_ns: int, wait: Callable[[int, int, int], int]
) -> None:  # fmt: skip
    """Make the messages of all layers: each its counts, and this rank's vote on its plan for the next iteration.

    Takes `timeout_ns` at most: after one wait in vain no layer waits. Arguments as of `plain.vote`.
    """
    for state in stack.states:
        plain.vote(model, state, state, timeout_ns=timeout_ns, wait=wait, early=True)


def settle_and_fold_all(model: ModelState, stack: LayerStack, *, ranks: int, decay: float) -> None:
    """Decide on all plans that were voted on, and fold all counts in, by the messages, which the ranks have summed."""
    for state in stack.states:
        summed = state.message.unsqueeze(0)
        plain.settle(model, state, summed[:, state.experts :], ranks=ranks, early=True)
        plain.fold(model, state, summed[:, : state.experts], decay=decay)


def hand_over_all(model: ModelState, stack: LayerStack, *, delay: int) -> None:
    """`plain.hand_over` of all layers, in their order."""
    for state in stack.states:
        plain.hand_over(model, state, delay=delay)
