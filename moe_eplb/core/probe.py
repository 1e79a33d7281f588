"""What a checker may watch while the model runs. The running half calls a probe; it never asks it anything.

Tensors are typed `Any` because this package does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan

__all__ = ["NullProbe", "Probe", "Probes"]


class Probe(Protocol):
    """Observer of one rank. Every method is called on the model's thread."""

    def routed(self, layer: int, expert_ids: Any, slot_ids: Any) -> None:
        """A source rank chose slots: both int32 [T, K], slots global."""

    def processed(self, layer: int, source_rank: Any, token: Any, k: Any, slot: Any) -> None:
        """The entries [N] whose expert computation this rank does, from the tensors handed to it; slots global."""

    def output(self, layer: int, x: Any, router_logits: Any, expert_ids: Any, scales: Any, y: Any) -> None:
        """A forward of a layer finished: x and y [T, D], logits [T, E], ids int32 [T, K], scales float32 [T, K]."""

    def shared_output(self, layer: int, x: Any, y: Any) -> None:
        """A layer's shared expert finished: x and y [T, D]."""

    def block_output(self, layer: int, x: Any, y: Any) -> None:
        """A forward of a block with a shared expert finished, after `output` and `shared_output`: x and y [T, D]."""

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        """Statistics int64 [E] were reduced and folded; the balancer reports this balancedness for them."""

    def stalled(self, layer: int, seconds: float) -> None:
        """The model waited so long for an update of the layer that was not ready when it was needed."""

    def awaited(self, layer: int, seconds: float) -> None:
        """The thread that launches the model waited so long for an update of the layer, before it enqueued what needs
        it; the device may have had work meanwhile."""

    def planned(self, layer: int, taken: int, due: int, plan: Plan, staged_bytes: int) -> None:
        """A plan is put to the vote; this rank has staged so many bytes for it."""

    def copied(self, layer: int, by_source: Mapping[str, int]) -> None:
        """Bytes that this rank took from ``host``, ``own`` or ``peer`` memory for the plan that is committed next."""

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        """The plan became the layer's placement: weights and tables are new."""

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        """A plan was given up by all ranks."""

    def iterated(self, iteration: int) -> None:
        """The balancer's iteration came to its end; one that is aborted does not."""


class NullProbe:
    """A probe that watches nothing."""

    def routed(self, layer: int, expert_ids: Any, slot_ids: Any) -> None:
        return None

    def processed(self, layer: int, source_rank: Any, token: Any, k: Any, slot: Any) -> None:
        return None

    def output(self, layer: int, x: Any, router_logits: Any, expert_ids: Any, scales: Any, y: Any) -> None:
        return None

    def shared_output(self, layer: int, x: Any, y: Any) -> None:
        return None

    def block_output(self, layer: int, x: Any, y: Any) -> None:
        return None

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        return None

    def stalled(self, layer: int, seconds: float) -> None:
        return None

    def awaited(self, layer: int, seconds: float) -> None:
        return None

    def planned(self, layer: int, taken: int, due: int, plan: Plan, staged_bytes: int) -> None:
        return None

    def copied(self, layer: int, by_source: Mapping[str, int]) -> None:
        return None

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        return None

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        return None

    def iterated(self, iteration: int) -> None:
        return None


class Probes:
    """Passes everything on to several probes, in their order."""

    def __init__(self, *probes: Probe) -> None:
        self._probes = probes

    def routed(self, layer: int, expert_ids: Any, slot_ids: Any) -> None:
        for probe in self._probes:
            probe.routed(layer, expert_ids, slot_ids)

    def processed(self, layer: int, source_rank: Any, token: Any, k: Any, slot: Any) -> None:
        for probe in self._probes:
            probe.processed(layer, source_rank, token, k, slot)

    def output(self, layer: int, x: Any, router_logits: Any, expert_ids: Any, scales: Any, y: Any) -> None:
        for probe in self._probes:
            probe.output(layer, x, router_logits, expert_ids, scales, y)

    def shared_output(self, layer: int, x: Any, y: Any) -> None:
        for probe in self._probes:
            probe.shared_output(layer, x, y)

    def block_output(self, layer: int, x: Any, y: Any) -> None:
        for probe in self._probes:
            probe.block_output(layer, x, y)

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        for probe in self._probes:
            probe.reduced(layer, counts, balancedness)

    def stalled(self, layer: int, seconds: float) -> None:
        for probe in self._probes:
            probe.stalled(layer, seconds)

    def awaited(self, layer: int, seconds: float) -> None:
        for probe in self._probes:
            probe.awaited(layer, seconds)

    def planned(self, layer: int, taken: int, due: int, plan: Plan, staged_bytes: int) -> None:
        for probe in self._probes:
            probe.planned(layer, taken, due, plan, staged_bytes)

    def copied(self, layer: int, by_source: Mapping[str, int]) -> None:
        for probe in self._probes:
            probe.copied(layer, by_source)

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        for probe in self._probes:
            probe.committed(layer, taken, placement, changed, moved_bytes)

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        for probe in self._probes:
            probe.dropped(layer, due, ready, digests_differ, reason)

    def iterated(self, iteration: int) -> None:
        for probe in self._probes:
            probe.iterated(iteration)
