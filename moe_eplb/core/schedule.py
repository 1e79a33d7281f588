"""Which layers are updated in which iteration."""

from __future__ import annotations

from typing import Literal

__all__ = ["EmptyGroup", "UpdateSchedule", "update_groups"]

EmptyGroup = Literal["reference", "never"]


def update_groups(
    layers: int, layer_updates_per_iter: int, *, empty_group: EmptyGroup = "reference"
) -> tuple[tuple[int, ...], ...]:
    """Groups of layers, one group an iteration, in a cycle of F = ceil(L / layer_updates_per_iter) or F + 1.

    Layer l belongs to group l mod F. TensorRT-LLM adds an empty group when the first and the last group are equally
    large; "never" leaves it out, so that every iteration updates something. No groups for 0 updates.
    """
    if layer_updates_per_iter == 0 or layers == 0:
        return ()
    cycle = -(-layers // layer_updates_per_iter)
    groups = tuple(tuple(range(first, layers, cycle)) for first in range(cycle))
    even = len(groups[0]) == len(groups[-1])
    return (*groups, ()) if even and empty_group == "reference" else groups


class UpdateSchedule:
    """Walks through the groups, one for each iteration that has updates.

    Attributes:
        groups: See `update_groups`.
        warm_up_until: The last iteration that updates nothing.
    """

    def __init__(self, layers: int, layer_updates_per_iter: int, *, empty_group: EmptyGroup = "reference") -> None:
        self.groups = update_groups(layers, layer_updates_per_iter, empty_group=empty_group)
        self.warm_up_until = -1
        self._turn = 0

    def begin(self, iteration: int) -> tuple[int, ...]:
        """The layers to update in this iteration; call it once for each iteration that has updates enabled."""
        if not self.groups or iteration <= self.warm_up_until:
            return ()
        group = self.groups[self._turn % len(self.groups)]
        self._turn += 1
        return group
