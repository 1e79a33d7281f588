"""TensorRT-LLM's MultiLayerTest (``cpp/tests/unit_tests/runtime/moeLoadBalancerTest.cpp``) in its four sizes.

As upstream: one process plays its rank, the iterations switch statistics and updates on and off, every layer sees the
iteration's number and the statistics flag, layers that are not scheduled keep their weights to the bit, warm-up moves
nothing, and slots are strided (1024 wide, pitch 2048, 10 high; narrower in the large case). Upstream leaves open
whether scheduled layers change. Here they must: every placement is foretold from the counts, the slots hold the new
expert's weights, over three full cycles of updates beyond upstream's own iterations.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots, plan
from moe_eplb.device import get_device
from tests.support.balanced import NAME, AllHost, Journal, StandIn

HEIGHT = 10
CYCLES = 3
UNTOUCHED = -1
BOTH, COUNT, NONE = (True, True), (True, False), (False, False)


class Case(NamedTuple):
    """Upstream's parameters, and for each of its iterations whether it counts and whether it updates."""

    experts: int
    top_k: int
    rank: int
    ranks: int
    per_rank: int
    layers: int
    updates: int
    warm_up: int
    flags: tuple[tuple[bool, bool], ...]
    width: int = 1024


CASES = [
    Case(8, 2, 0, 2, 4, 2, 1, 2, (BOTH, BOTH, BOTH, COUNT, BOTH, NONE)),
    Case(16, 1, 0, 4, 4, 3, 2, 1, (BOTH, BOTH, COUNT, BOTH)),
    Case(32, 4, 1, 8, 4, 5, 3, 0, (BOTH, NONE, BOTH)),
    Case(256, 8, 4, 36, 8, 61, 10, 5, (*[BOTH] * 13, NONE, COUNT, BOTH, NONE, NONE, *[BOTH] * 4), 64),
]


def weights_of(case: Case, layer: int, expert: int) -> Tensor:
    """int32 [HEIGHT, width]: no element is that of another place, expert or layer."""
    size = HEIGHT * case.width
    return torch.arange(size, dtype=torch.int32).view(HEIGHT, case.width) + size * (layer * case.experts + expert)


class Host(AllHost):
    """Makes the host copies of all ranks as they are asked for."""

    def __init__(self, case: Case, layer: int) -> None:
        super().__init__(layer, case.experts)
        self._case = case

    def host_tensor(self, expert: int, name: str) -> Tensor:
        return weights_of(self._case, self._layer, expert)


class Granted(NullSink):
    """Keeps (layer, iteration) of every grant that really ran on the balancer stream."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        if kind is Kind.START_WAIT_GPU_STAGE and stream != HOST:
            self.seen.append((layer, iteration))
        return 0


class Model:
    """The rank's balancer with its layers' strided slots."""

    def __init__(self, case: Case, seed: int | None) -> None:
        self.case, self.granted, self.journal = case, Granted(), Journal()
        self.balancer = MoeLoadBalancer(
            case.rank, case.ranks, case.updates, "multi-layer", group=cast(Any, object()), probe=self.journal,
            device=get_device("cpu", self.granted, seed=seed, rank=case.rank), options=BalancerOptions(),
        )  # fmt: skip
        self.journal.balancer = self.balancer
        self.storage = [self._add_layer(layer) for layer in range(case.layers)]
        self.balancer.finalize_model()
        self.balancer.set_warm_up_iter_count(case.warm_up)

    def _add_layer(self, index: int) -> Tensor:
        case = self.case
        layer = self.balancer.add_layer(case.experts, case.top_k, case.per_rank)
        layer.updates.host = cast(Any, Host(case, index))
        storage = torch.full((case.per_rank, HEIGHT, 2 * case.width), UNTOUCHED, dtype=torch.int32)
        for slot, expert in enumerate(layer.local_slot_experts()):
            layer.register_weight_slot(slot, NAME, storage[slot, :, : case.width])
            storage[slot, :, : case.width] = weights_of(case, index, expert)
        return storage

    def iterate(self, statistic: bool, update: bool, counts: list[Tensor]) -> list[int]:
        """One iteration in which the ranks count `counts` [E] of each layer; the flag that each layer sees."""
        ids = torch.arange(self.case.top_k, dtype=torch.int32).unsqueeze(0)
        flags = []
        self.balancer.set_iter_info(statistic, update)
        self.balancer.start_iter()
        for layer, total in zip(self.balancer.layers, counts, strict=True):
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            flags.append(int(layer.statistic_flag_tensor.item()))
            others = total.clone()
            others[: self.case.top_k] -= int(statistic)  # what this rank counts by itself
            layer.update_statistic_with_local_ids(ids, True, True, StandIn(self.case.ranks, others))
            slots = layer.route(ids).numpy()
            assert layer.placement.slot_to_expert[slots].tolist() == ids.tolist()
            layer.start_set_cpu_stage()
            layer.done_set_cpu_stage()
        self.balancer.end_iter()
        return flags


class Foretold:
    """What the placements must be: the reference's schedule and load, and the planner's placement for each load."""

    def __init__(self, case: Case) -> None:
        self._case = case
        first = initial_slots(case.experts, case.ranks, case.per_rank)
        self.placements = [Placement(case.ranks, case.experts, first) for _ in range(case.layers)]
        self._loads = np.zeros((case.layers, case.experts), dtype=np.float32)
        self._due: dict[int, Placement] = {}
        self._turns = 0

    def scheduled(self, iteration: int, update: bool) -> list[int]:
        """The layers that hand over in this iteration."""
        case, cycle = self._case, -(-self._case.layers // self._case.updates)
        if not update or iteration < case.warm_up:
            return []
        turn = self._turns % (cycle + (case.layers % case.updates == 0))
        self._turns += 1
        return list(range(turn, case.layers, cycle)) if turn < cycle else []

    def iterate(self, iteration: int, statistic: bool, update: bool, counts: list[Tensor]) -> set[int]:
        """Go on by an iteration; the layers that get a new placement at its start."""
        begun, self._due = self._due, {}
        for layer, placement in begun.items():
            self.placements[layer] = placement
        if statistic:
            sample = torch.stack(counts).numpy().astype(np.float32)
            self._loads = self._loads * np.float32(0.95) + sample
        for layer in self.scheduled(iteration, update):
            self._due[layer] = plan(self._loads[layer], self.placements[layer]).placement
            self._loads[layer] = 0
        return set(begun)


def counts_of(case: Case, iteration: int) -> list[Tensor]:
    """int64 [E] for each layer: another heavy half of the experts for each layer and iteration."""
    rng = np.random.default_rng([case.experts, iteration])
    return [torch.from_numpy((rng.pareto(1.0, case.experts) * 20).astype(np.int64) + 1) for _ in range(case.layers)]


def all_flags(case: Case) -> list[tuple[bool, bool]]:
    """Upstream's iterations, then as many as three cycles take, then one that commits and takes nothing."""
    cycle = -(-case.layers // case.updates) + (case.layers % case.updates == 0)
    return [*case.flags, *[BOTH] * (CYCLES * cycle), COUNT]


def seeds(case: Case) -> list[int | None]:
    """None runs the balancer's work at once, a seed reorders it; the large case takes seconds and goes once."""
    return [7] if case is CASES[-1] else [None, 7]


@pytest.mark.parametrize(
    ("case", "seed"),
    [pytest.param(case, seed, id=f"{case[:8]}, seed {seed}") for case in CASES for seed in seeds(case)],
)
def test_multi_layer(case: Case, seed: int | None) -> None:
    """MoeLoadBalancerTests/MoeLoadBalancerTest.MultiLayerTest."""
    model, foretold = Model(case, seed), Foretold(case)
    changes: Counter[int] = Counter()
    try:
        for iteration, (statistic, update) in enumerate(all_flags(case)):
            before = [storage.clone() for storage in model.storage]
            counts = counts_of(case, iteration)
            flags = model.iterate(statistic, update, counts)
            assert flags == [int(statistic)] * case.layers
            assert model.granted.seen == [(layer, iteration) for layer in range(case.layers)]
            model.granted.seen.clear()
            committed = foretold.iterate(iteration, statistic, update, counts)
            assert {layer for layer, _, when in model.journal.commits if when == iteration} == committed
            for layer in range(case.layers):
                changed = not torch.equal(before[layer], model.storage[layer])
                assert not changed or layer in committed, f"layer {layer} changed in iteration {iteration}"
                changes[layer] += changed
            assert_weights(model, foretold, committed)
            assert committed == set() or iteration > case.warm_up
    finally:
        model.balancer.shutdown()
    assert model.journal.drops == []
    assert min(changes[layer] for layer in range(case.layers)) >= CYCLES, "scheduled layers really change"
    assert_weights(model, foretold, set(range(case.layers)))


def assert_weights(model: Model, foretold: Foretold, layers: set[int]) -> None:
    """The layers' slots hold the experts that were foretold, and what lies between the rows is untouched."""
    case = model.case
    for layer in sorted(layers):
        wanted = foretold.placements[layer]
        assert model.balancer.layers[layer].placement.slot_to_expert.tolist() == wanted.slot_to_expert.tolist()
        mine = wanted.slot_to_expert[wanted.rank_slots(case.rank)].tolist()
        rows = torch.stack([weights_of(case, layer, expert) for expert in mine])
        assert torch.equal(model.storage[layer][:, :, : case.width], rows)
        assert bool((model.storage[layer][:, :, case.width :] == UNTOUCHED).all())
