"""A balancer with small weights in its slots, run by hand: one process that stands in for rank r of R."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from moe_eplb.balancer import AllReduce, BalancerOptions, MoeLoadBalancer, SingleLayerMoeLoadBalancer
from moe_eplb.balancer.host_memory import new_instance
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.core.events import EventSink, Kind, NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import control, get_device, ops

__all__ = ["AllHost", "Journal", "Rig", "StandIn", "ids_of", "weight"]

NAME = "w"


def weight(layer: int, expert: int) -> Tensor:
    """float32 [3, 4], different for every layer and expert."""
    return torch.arange(12.0).reshape(3, 4) + 1000 * layer + 20 * expert


def ids_of(layer: int, iteration: int, experts: int, top_k: int, *, rank: int = 0, tokens: int) -> Tensor:
    """Skewed expert ids int32 [T, K], distinct in a token; the hot experts change with layer and iteration."""
    rng = np.random.default_rng([layer, iteration, rank])
    hot = np.random.default_rng([layer, iteration]).permutation(experts)
    scores = rng.gumbel(size=(tokens, experts)) - 4.0 * hot / experts
    return torch.from_numpy(np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32))


class AllHost:
    """Stands for the host copies of all ranks."""

    names = frozenset({NAME})
    host_bytes = 0

    def __init__(self, layer: int, experts: int) -> None:
        self._layer, self._experts = layer, experts

    def experts_of(self, rank: int) -> range:
        return range(0)

    def finalize(self) -> None:
        return None

    def host_tensor(self, expert: int, name: str) -> Tensor:
        return weight(self._layer, expert)

    def memory(self) -> list[Tensor]:
        return []

    def close(self) -> None:
        return None


class StandIn(AllReduce):
    """A sum over R ranks of which this process is one: the others count `others` [..., E] and vote as this one does."""

    def __init__(self, ranks: int, others: Tensor) -> None:
        self._ranks, self._others = ranks, others

    def __call__(self, tensor: Tensor) -> None:
        experts = self._others.shape[-1]
        tensor[..., :experts] += self._others
        tensor[..., experts:] *= self._ranks


class Journal(NullProbe):
    """Keeps what the balancer reports, with the iteration in which it did."""

    def __init__(self) -> None:
        self.balancer: MoeLoadBalancer | None = None
        self.commits: list[tuple[int, int, int]] = []
        self.drops: list[tuple[int, int, str]] = []
        self.loads: list[tuple[int, list[int]]] = []
        self.placements: list[tuple[int, list[int]]] = []

    @property
    def _now(self) -> int:
        assert self.balancer is not None
        return self.balancer.device.iteration

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        self.commits.append((layer, taken, self._now))
        self.placements.append((layer, placement.slot_to_expert.tolist()))

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        self.drops.append((layer, self._now, reason))

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        self.loads.append((layer, counts.tolist()))


class Rig:
    """A finalized balancer with `layers` layers and its slots' storage.

    Args:
        layers, experts, top_k: L, E, K.
        updates: layer_updates_per_iter.
        slots_per_rank: P / R; by default E / R + 1.
        rank, ranks: Whose part this process plays; the other ranks exist in `StandIn` only.
        group: Of real ranks; then host copies are really shared.
        seed: Seed of the reordering, None runs everything at once.
        tokens: T.
        check_order: Record work that did not wait for what it must come after.
        holds: Hold statistics until the experts have been submitted, in whose midst they may begin.
    """

    def __init__(
        self,
        layers: int = 2,
        experts: int = 6,
        top_k: int = 2,
        *,
        updates: int = 1,
        slots_per_rank: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        group: Any = None,
        seed: int | None = None,
        tokens: int = 24,
        check_order: bool = False,
        sink: EventSink | None = None,
        holds: bool = False,
        **options: Any,
    ) -> None:
        self.holds = holds
        self.experts, self.top_k, self.rank, self.ranks, self.tokens = experts, top_k, rank, ranks, tokens
        self.journal = Journal()
        self.balancer = MoeLoadBalancer(
            rank, ranks, updates, None if group or ranks == 1 else new_instance(),
            device=get_device("cpu", sink or NullSink(), seed=seed, rank=rank, check_order=check_order),
            group=cast(Any, group or object()) if ranks > 1 else None,
            options=BalancerOptions(**options), probe=self.journal,
        )  # fmt: skip
        self.journal.balancer = self.balancer
        self._fake_host = ranks > 1 and group is None
        self.cells: list[Tensor] = []
        self.storage = [self._add_layer(index, slots_per_rank or experts // ranks + 1) for index in range(layers)]
        self.balancer.finalize_model()
        if updates:
            self.balancer.set_iter_info(True, True)

    def _add_layer(self, index: int, slots_per_rank: int) -> Tensor:
        layer = self.balancer.add_layer(self.experts, self.top_k, slots_per_rank)
        cells = slots_per_rank + layer.spare_slots
        storage = torch.full((cells, 3, 8), -1.0)  # rows are wider than the weights: slots are strided views
        self.cells.append(torch.arange(slots_per_rank, dtype=torch.int32))
        layer.register_weight_cells(self.cells[-1], [{NAME: storage[cell, :, :4]} for cell in range(cells)])
        if self._fake_host:
            layer.updates.host = cast(Any, AllHost(index, self.experts))
        for slot, expert in enumerate(layer.local_slot_experts()):
            view = storage[slot, :, :4]
            view.copy_(weight(index, expert))
            layer.register_weight_slot(slot, NAME, view)
        for expert in layer.load_expert_ids:
            layer.share_expert_weight(expert, NAME, weight(index, expert))
        return storage

    @property
    def layers(self) -> list[SingleLayerMoeLoadBalancer]:
        return self.balancer.layers

    def ids(self, layer: int, iteration: int) -> Tensor:
        return ids_of(layer, iteration, self.experts, self.top_k, rank=self.rank, tokens=self.tokens)

    def others(self, layer: int, iteration: int) -> Tensor:
        """int64 [E]: what the ranks that do not exist count."""
        total = torch.zeros(self.experts, dtype=torch.int64)
        for rank in set(range(self.ranks)) - {self.rank}:
            ids = ids_of(layer, iteration, self.experts, self.top_k, rank=rank, tokens=self.tokens)
            total += torch.bincount(ids.flatten(), minlength=self.experts)
        return total

    def run_layer(
        self, index: int, *, allreduce: AllReduce | None = None, on_held: Callable[[], None] = lambda: None
    ) -> Tensor:
        """One forward on path B; returns the slots chosen."""
        layer, iteration = self.layers[index], self.balancer.iter_id
        ids = self.ids(index, iteration)
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        if self.holds:
            layer.hold_statistics()
        layer.update_statistic_with_local_ids(ids, True, True, allreduce or self._stand_in(index, iteration))
        slots = layer.route(ids)
        if self.holds:
            for grouped in (False, True):
                self.balancer.device.run(Kind.EXPERTS, index, partial(layer.mark_statistics, grouped=grouped))
            layer.release_statistics()
        on_held()
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
        return slots

    def _stand_in(self, layer: int, iteration: int) -> StandIn | None:
        if self.ranks == 1:
            return None
        if self.balancer.options.reduction == "layer":
            return StandIn(self.ranks, self.others(layer, iteration))
        return StandIn(self.ranks, torch.stack([self.others(one, iteration) for one in range(len(self.layers))]))

    def iterate(self, count: int = 1, allreduce: AllReduce | None = None) -> list[list[list[int]]]:
        """Whole iterations; returns the slots chosen in the last one, by layer."""
        slots: list[list[list[int]]] = []
        for _ in range(count):
            self.balancer.start_iter()
            slots = [self.run_layer(index, allreduce=allreduce).tolist() for index in range(len(self.layers))]
            self.balancer.end_iter()
        return slots

    def share_queue(self) -> None:
        """All layers put their balancer work on one stream, as those of a model do."""
        first, *others = (layer._our_stream for layer in self.residents())
        for stream in others:
            assert first is not None
            assert stream is not None
            stream._aux = first._aux

    def residents(self) -> list[ResidentLayer]:
        return self.balancer._resident_layers

    def replay(self) -> None:
        """What a graph of all layers does."""
        layers, options = self.residents(), self.balancer.options
        control.take_over(layers[0].resident.model, layers[0].state)
        for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
            model, state, resident = layer.resident.model, layer.state, layer.resident
            ops.histogram(self.ids(layer.layer_idx, self.balancer.iter_id), state.counts)
            control.vote(model, state, following.state, timeout_ns=resident.timeout_ns, wait=resident.wait)
            control.settle_and_fold(model, state, following.state, state.message, ranks=1, decay=options.decay)
            if following is layers[0]:
                control.look_ahead(model)
            else:
                control.take_over(model, following.state)
            control.hand_over(model, state, delay=options.commit_delay)
            resident.bell.tell()

    def placements(self) -> list[list[int]]:
        return [layer.placement.slot_to_expert.tolist() for layer in self.layers]

    def assert_weights_match(self) -> None:
        """Every slot holds the weights of the expert that the placement names, and nothing beside them."""
        for index, layer in enumerate(self.layers):
            wanted = torch.stack([weight(index, expert) for expert in layer.local_slot_experts()])
            assert torch.equal(self.storage[index][self.cells[index].long(), :, :4], wanted)
            assert bool((self.storage[index][:, :, 4:] == -1).all())
