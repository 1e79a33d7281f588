"""Plans carried out: whatever moves, each slot holds its expert's weights afterwards, and all replicas are alike.

The sizes and the way to fill weights are those of vLLM's test of its own moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from moe_eplb.balancer.host_memory import new_instance
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.balancer.migrate import SlotWeights
from moe_eplb.core.planner import initial_slots
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem

SIZES = [(2, 1, 2, 3), (2, 2, 3, 4), (2, 4, 8, 16), (4, 1, 2, 6), (4, 2, 2, 5), (4, 8, 8, 16)]
"""Ranks, layers, slots of a rank, experts."""
NAMES = ("w3_w1", "w2", "scale")


def _filled(expert: int, layer: int, tensor: int) -> torch.Tensor:
    return (expert * 1000 + layer * 100 + tensor * 10 + torch.arange(6.0)).reshape(2, 3)


class _Ranks:
    """All ranks' slots of one layer in this process: [P, 2, 3] for each weight."""

    def __init__(self, layer: int, ranks: int, per_rank: int, host: HostMoeTensorSharer) -> None:
        self.tensors = {name: torch.full((ranks * per_rank, 2, 3), torch.nan) for name in NAMES}
        self.weights = [SlotWeights(layer, per_rank) for _ in range(ranks)]
        self.per_rank, self.host = per_rank, host
        for slot in range(ranks * per_rank):
            for name in NAMES:
                self.weights[slot // per_rank].register(slot % per_rank, name, self.tensors[name][slot])

    def move(self, old: np.ndarray, new: np.ndarray, *, write: bool = True) -> int:
        """Stage what differs, on each rank for itself, and write it; the bytes that were staged."""
        size = 0
        for rank, weights in enumerate(self.weights):
            first = rank * self.per_rank
            differ = [slot for slot in range(first, first + self.per_rank) if old[slot] != new[slot]]
            staged = weights.stage([(slot - first, int(new[slot])) for slot in differ], self.host)
            size += staged.bytes
            if write:
                weights.write(staged)
        return size


@pytest.fixture(params=SIZES, ids=str)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    size: tuple[int, int, int, int] = request.param
    return size


@pytest.fixture
def model(sizes: tuple[int, int, int, int]) -> Iterator[list[_Ranks]]:
    """Layers with the host's copies of all experts; slots hold nothing yet."""
    ranks, layers, per_rank, experts = sizes
    with ExitStack() as stack:
        made = []
        for layer in range(layers):
            host = HostMoeTensorSharer(layer, experts, rank=0, ranks=1, instance=new_instance(), group=None)
            stack.callback(host.close)
            for expert in range(experts):
                for number, name in enumerate(NAMES):
                    host.share_host_tensor(expert, name, _filled(expert, layer, number))
            host.finalize()
            made.append(_Ranks(layer, ranks, per_rank, host))
        yield made


def _require(model: list[_Ranks], slots: np.ndarray) -> None:
    for layer, (ranks, row) in enumerate(zip(model, slots, strict=True)):
        for number, name in enumerate(NAMES):
            wanted = torch.stack([_filled(int(expert), layer, number) for expert in row])
            assert torch.equal(ranks.tensors[name], wanted), (layer, name)


@pytest.mark.parametrize("policy", ["greedy", "refine", "incremental", "robust"])
def test_every_slot_holds_its_expert_after_many_plans(
    sizes: tuple[int, int, int, int], model: list[_Ranks], policy: str
) -> None:
    ranks, layers, per_rank, experts = sizes
    rng = np.random.default_rng(ranks)
    there = np.tile(initial_slots(experts, ranks, per_rank), (layers, 1))
    for layer, row in zip(model, there, strict=True):
        layer.move(np.full_like(row, -1), row)
    _require(model, there)
    moved = 0
    for _ in range(6):
        loads = np.exp(rng.normal(0, 1.5, (2, layers, experts)))
        new = solve(Problem(loads, ranks, ranks * per_rank, current=there), policy).slots
        for layer, old, row in zip(model, there, new, strict=True):
            staged = layer.move(old, row)
            assert staged == int((old != row).sum()) * len(NAMES) * 6 * 4
            moved += staged
        _require(model, new)
        there = new
    assert moved > 0


def test_what_does_not_change_is_not_touched(sizes: tuple[int, int, int, int], model: list[_Ranks]) -> None:
    ranks, layers, per_rank, experts = sizes
    there = np.tile(initial_slots(experts, ranks, per_rank), (layers, 1))
    for layer, row in zip(model, there, strict=True):
        layer.move(np.full_like(row, -1), row)
        assert layer.move(row, row) == 0
    other = solve(
        Problem(np.exp(np.random.default_rng(1).normal(0, 2, (layers, experts))), ranks, there.shape[1]), "greedy"
    )
    for layer, old, row in zip(model, there, other.slots, strict=True):
        layer.move(old, row, write=False)  # staged to be measured, and dropped
    _require(model, there)
