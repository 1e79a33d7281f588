"""TensorRT-LLM's ``cpp/tests/unit_tests/kernels/moeLoadBalanceKernelTest.cpp``, test for test, on this balancer.

Upstream's signal passes between a device thread and a host thread that both spin. Here the balancer stream grants and
hands over and the updater's thread answers with a plan, so the order of those is what must hold for a thousand rounds.
Upstream's block sizes divide its expert counts (8 and 64); 1, 129 and 1000 are added, which no block size divides.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import MoeLoadBalancer, SingleLayerMoeLoadBalancer
from moe_eplb.core.events import HOST, Kind, NullSink
from tests.support.balanced import Rig, StandIn

ROUNDS = 1000


# -- MoeLoadBalanceSignalKernelTest ----------------------------------------------------------------------------------


class Handing(NullSink):
    """Keeps (kind, layer, iteration) of what really ran: the grant, the use, and the hand-over."""

    KINDS = frozenset({Kind.START_WAIT_GPU_STAGE, Kind.ROUTE, Kind.START_SET_CPU_STAGE})

    def __init__(self) -> None:
        self.seen: list[tuple[Kind, int, int]] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        if kind in self.KINDS and stream != HOST:
            self.seen.append((kind, layer, iteration))
        return 0


@pytest.mark.parametrize("seed", [None, 3])
def test_signaling(seed: int | None) -> None:
    """MoeLoadBalanceSignalKernelTest.TestSignaling: a thousand rounds in order, no hang, in bounded time."""
    sink = Handing()
    rig = Rig(2, updates=2, empty_group="never", seed=seed, sink=sink)
    began = time.monotonic()
    rig.iterate(ROUNDS)
    seconds = time.monotonic() - began
    rig.balancer.shutdown()
    for layer in range(2):
        handed = [(kind, iteration) for kind, on, iteration in sink.seen if on == layer]
        order = (Kind.START_WAIT_GPU_STAGE, Kind.ROUTE, Kind.START_SET_CPU_STAGE)
        assert handed == [(kind, iteration) for iteration in range(ROUNDS) for kind in order]
        answered = [(taken, when) for on, taken, when in rig.journal.commits if on == layer]
        assert answered == [(i, i + 1) for i in range(ROUNDS - 1)], "each hand-over is answered before the next grant"
    assert rig.journal.drops == []
    assert seconds < 30


# -- MoeLoadBalanceStatisticKernelTest -------------------------------------------------------------------------------

# (E, K, rank, R, slots per rank, T of a rank, is_first_stage, is_last_stage, decay): upstream's two, then our sizes
STATISTICS = [
    (8, 2, 0, 2, 4, 128, True, True, 0.9),
    (64, 4, 1, 4, 16, 512, False, True, 0.95),
    *[
        (experts, top_k, 0, 2, experts // 2 + 1, 300, first, last, 0.95)
        for experts, top_k in ((8, 2), (64, 4), (1, 1), (129, 3), (1000, 8))
        for first, last in ((True, True), (False, True), (True, False))
    ],
]


def some_ids(experts: int, top_k: int, tokens: int, seed: int) -> Tensor:
    """int32 [T, K] with every id from -1 to E: both ends are no expert."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, experts + 1, (tokens, top_k), dtype=np.int32))


def tally(ids: Tensor, experts: int) -> np.ndarray:
    """int64 [E], counted one after the other."""
    counts = np.zeros(experts, dtype=np.int64)
    for expert in ids.flatten().tolist():
        if 0 <= expert < experts:
            counts[expert] += 1
    return counts


@pytest.mark.parametrize(
    ("experts", "top_k", "rank", "ranks", "per_rank", "tokens", "first", "last", "decay"), STATISTICS
)
def test_statistics(
    experts: int, top_k: int, rank: int, ranks: int, per_rank: int, tokens: int, first: bool, last: bool, decay: float
) -> None:
    """MoeLoadBalanceStatisticKernelTests.TestStatistics: counts and load; ids that are no expert count nothing.

    A load of 1 stands, as upstream. Where the stage is not the first, an earlier one has counted something.
    """
    rig = Rig(2, experts, top_k, slots_per_rank=per_rank, rank=rank, ranks=ranks, decay=decay)
    layer = rig.layers[0]
    layer._statistics.load.fold(torch.ones(experts, dtype=torch.int64))
    earlier, ids = some_ids(experts, top_k, 50, seed=1), some_ids(experts, top_k, tokens * ranks, seed=2)
    rig.balancer.start_iter()
    layer.start_wait_gpu_stage()
    layer.done_wait_gpu_stage()
    if not first:
        layer.update_statistic_with_global_ids(earlier, True, False)
    layer.update_statistic_with_global_ids(ids, first, last)
    expected = tally(ids, experts) + (0 if first else tally(earlier, experts))
    assert layer._statistics.counts().dtype == torch.int32
    assert layer._statistics.counts().tolist() == expected.tolist()
    load = np.ones(experts, dtype=np.float32)
    if last:
        load = load * np.float32(decay)
        load = load + expected.astype(np.float32)
    assert layer._statistics.load._load.tolist() == load.tolist()
    rig.balancer.abort_iter()
    rig.balancer.shutdown()


@pytest.mark.parametrize("experts", [1, 8, 64, 129, 1000])
def test_statistics_of_the_other_two_paths(experts: int) -> None:
    """TestStatistics once more for local ids, summed and gathered, with the second of two stages not the first."""
    ids, others = some_ids(experts, 1, 700, seed=3), torch.arange(experts) % 7
    expected = (tally(ids, experts) + others.numpy()).tolist()
    rig = Rig(2, experts, 1, slots_per_rank=experts, ranks=2)
    rig.balancer.start_iter()
    for layer in rig.layers:
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        if layer.layer_idx == 0:
            layer.update_statistic_with_local_ids(ids[:300], True, False, StandIn(2, others))
            layer.update_statistic_with_local_ids(ids[300:], False, True, StandIn(2, others))
        else:
            layer.update_local_statistic(ids[:300], True, False)
            layer.update_local_statistic(ids[300:], False, True)
            mine = layer.get_local_statistic_tensor()
            assert mine is not None
            layer.update_statistic_with_gathered_statistic(torch.stack([mine, others.to(torch.int32)]))
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
    rig.balancer.end_iter()
    rig.balancer.shutdown()
    assert rig.journal.loads == [(0, expected), (1, expected)]


# -- MoeLoadBalanceRouteKernelTest -----------------------------------------------------------------------------------

# (E, K, rank, R, slots per rank, T): upstream's three, then sizes that no block divides
ROUTES = [
    (8, 2, 0, 2, 5, 128), (256, 8, 1, 32, 12, 5000), (16, 2, 0, 1, 16, 64),
    (1, 1, 1, 2, 3, 1500), (129, 3, 1, 3, 44, 1000), (1000, 8, 1, 4, 256, 400),
]  # fmt: skip


def routed_layer(experts: int, top_k: int, rank: int, ranks: int, per_rank: int) -> SingleLayerMoeLoadBalancer:
    """A layer with every expert in a slot, the rest of the slots at random, all shuffled."""
    rng = np.random.default_rng(1234)
    extra = rng.integers(0, experts, ranks * per_rank - experts)
    layer = MoeLoadBalancer(rank, ranks, 0).add_layer(experts, top_k, per_rank)
    layer.set_initial_weight_assignments(rng.permutation([*range(experts), *extra]).tolist())
    return layer


def block_of_1024_model(ids: list[int], slot_to_expert: list[int], experts: int, offset: int) -> list[int]:
    """The slot of each entry: blocks of 1024 count their entries of an expert from the block's number on."""
    replicas: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(slot_to_expert):
        replicas[expert].append(slot)
    slots = []
    for first in range(0, len(ids), 1024):
        begin = first // 1024 + offset
        turns = [begin] * experts
        for expert in ids[first : first + 1024]:
            if not 0 <= expert < experts:
                slots.append(len(slot_to_expert))
                continue
            slots.append(replicas[expert][turns[expert] % len(replicas[expert])])
            turns[expert] += 1
    return slots


@pytest.mark.parametrize("offset_by_ep_rank", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "rank", "ranks", "per_rank", "tokens"), ROUTES)
def test_basic_routing(
    experts: int, top_k: int, rank: int, ranks: int, per_rank: int, tokens: int, offset_by_ep_rank: bool
) -> None:
    """MoeLoadBalanceRouteKernelTests.TestBasicRouting, with ids among them that are no expert."""
    layer = routed_layer(experts, top_k, rank, ranks, per_rank)
    slot_to_expert = layer.placement.slot_to_expert.tolist()
    ids = some_ids(experts, top_k, tokens, seed=5)
    slots = layer.route(ids, offset_by_ep_rank)
    offset = rank if offset_by_ep_rank else 0
    assert slots.dtype == torch.int32
    assert slots.flatten().tolist() == block_of_1024_model(ids.flatten().tolist(), slot_to_expert, experts, offset)


def test_the_offset_makes_a_difference() -> None:
    """Else both halves of the test above would hold one thing: upstream tests without the offset alone."""
    layer = routed_layer(256, 8, 1, 32, 12)
    ids = some_ids(256, 8, 100, seed=5)
    assert not torch.equal(layer.route(ids, True), layer.route(ids, False))


@pytest.mark.parametrize("offset_by_ep_rank", [False, True])
@pytest.mark.parametrize(("experts", "top_k", "rank", "ranks", "per_rank", "tokens"), ROUTES)
def test_invalid_expert_ids(
    experts: int, top_k: int, rank: int, ranks: int, per_rank: int, tokens: int, offset_by_ep_rank: bool
) -> None:
    """MoeLoadBalanceRouteKernelTests.TestInvalidExpertIds: ids -1 and E go to the invalid slot P."""
    layer = routed_layer(experts, top_k, rank, ranks, per_rank)
    for invalid in (-1, experts):
        ids = torch.full((tokens, top_k), invalid, dtype=torch.int32)
        assert set(layer.route(ids, offset_by_ep_rank).flatten().tolist()) == {ranks * per_rank}
