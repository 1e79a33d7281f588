"""State of all layers in few tensors, which one kernel goes over and one collective sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_eplb.device.control.state import HostVisible, LayerState, nothing_counted

__all__ = ["LayerStack"]


@dataclass(slots=True)
class LayerStack:
    """The tensors of L layers with E experts and a window of W, each with a row for a layer. See `LayerState`.

    Attributes:
        counts: int32 [L, E].
        lanes: int64 [L, LANES].
        message: int64 [L, E + LANES]; a row's lanes are the vote on that layer's own plan.
        load: float32 [L, E].
        recent: int64 [L, W, E].
        folded: int64 [L].
        reduced: int64 [L, E].
        handed: int64 [L], host-visible.
        handed_load: float32 [L, E], host-visible.
        states: The layers' states, in order of layers, whose tensors are rows of these; see `add`.
    """

    counts: Tensor
    lanes: Tensor
    message: Tensor
    load: Tensor
    recent: Tensor
    folded: Tensor
    reduced: Tensor
    handed: Tensor
    handed_load: Tensor
    states: list[LayerState]

    @staticmethod
    def make(layers: int, experts: int, window: int, device: torch.device, host_visible: HostVisible) -> LayerStack:
        """State of a model that has counted nothing."""
        return LayerStack(**nothing_counted((layers,), experts, window, device, host_visible), states=[])

    @property
    def layers(self) -> int:
        """L."""
        return self.counts.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.counts.shape[1]

    def add(self, tables: Tensor, cells: Tensor) -> LayerState:
        """The state of the next layer, with its live tables and cells."""
        at = len(self.states)
        state = LayerState(
            layer=at, tables=tables, cells=cells,
            pending=torch.zeros(tables.numel() + cells.numel(), dtype=torch.int32, device=tables.device),
            lanes=self.lanes[at], counts=self.counts[at], message=self.message[at], load=self.load[at],
            recent=self.recent[at], folded=self.folded[at : at + 1], reduced=self.reduced[at],
            handed=self.handed[at : at + 1], handed_load=self.handed_load[at],
        )  # fmt: skip
        self.states.append(state)
        return state
