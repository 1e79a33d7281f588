"""Numbers of experts that no block size divides, in histogram, load update and routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import statistics
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.balancer.statistics import LoadWindow
from tests.support.balanced import Rig
from tests.support.faults.base import Fault, demand

__all__ = ["FAULTS"]

EXPERTS = (1, 129, 1000)
BLOCK = 128
GUARD = 256
"""Elements before and after a tensor that nothing may touch."""
CANARY = -7


def guarded(experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory with a guard on both sides, and the zeroed [E] in its middle."""
    memory = torch.full((experts + 2 * GUARD,), CANARY, dtype=dtype)
    middle = memory[GUARD : GUARD + experts]
    middle.zero_()
    return memory, middle


def intact(memory: Tensor) -> bool:
    return bool((memory[:GUARD] == CANARY).all()) and bool((memory[-GUARD:] == CANARY).all())


def ids_for(experts: int) -> Tensor:
    """int32 [T, 1]: every expert, the last one most often, and ids on both sides of them."""
    ids = [*range(-2, experts + 3), *[experts - 1] * 5, *[experts] * 4, *[-1] * 3]
    return torch.tensor(ids, dtype=torch.int32).unsqueeze(1)


def check_sizes() -> None:
    """Every expert is counted, loaded and routed, the last one too, and nothing outside is."""
    found = []
    for experts in EXPERTS:
        try:
            check_size(experts)
        except AssertionError as error:
            found.append(str(error))
    demand(not found, "; ".join(found))


def check_size(experts: int) -> None:
    rig = Rig(2, experts, 1, slots_per_rank=experts + 1)
    layer, ids = rig.layers[0], ids_for(experts)
    expected = np.bincount(ids.numpy()[(ids.numpy() >= 0) & (ids.numpy() < experts)], minlength=experts)
    counts_memory, counts = guarded(experts, torch.int32)
    load_memory, load = guarded(experts, torch.float32)
    layer._statistics._counts, layer._statistics.load._load = counts, load
    rig.balancer.start_iter()
    try:
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_global_ids(ids, True, True)
        demand(counts.tolist() == expected.tolist(), f"the histogram of {experts} experts is wrong")
        demand(intact(counts_memory), f"the histogram of {experts} experts writes out of bounds")
        demand(layer._statistics.load._load.tolist() == expected.tolist(), f"the load of {experts} experts is wrong")
        demand(intact(load_memory), f"the load update of {experts} experts writes out of bounds")
        slots = layer.route(ids).flatten().tolist()
    finally:
        rig.balancer.abort_iter()
        rig.balancer.shutdown()
    held = [*layer.placement.slot_to_expert.tolist(), "none"]
    wanted = [expert if 0 <= expert < experts else "none" for expert in ids.flatten().tolist()]
    demand([held[slot] for slot in slots] == wanted, f"the routing of {experts} experts is wrong")


def whole_blocks(experts: int) -> int:
    """How far blocks reach that are never begun for a rest."""
    return experts // BLOCK * BLOCK


def rest_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The histogram is made of whole blocks."""

    def accumulate(ids: Tensor, counts: Tensor) -> None:
        inside = ids[(ids >= 0) & (ids < whole_blocks(counts.numel()))]
        counts += torch.bincount(inside, minlength=counts.numel()).to(torch.int32)

    patch.setattr(statistics, "accumulate", accumulate)


def ids_not_bounded(patch: pytest.MonkeyPatch) -> None:
    """The histogram of ids that are no expert goes where the id points to."""

    def accumulate(ids: Tensor, counts: Tensor) -> None:
        around = counts.as_strided((counts.numel() + 8,), (1,), counts.storage_offset() - 4)
        around += torch.bincount(ids.flatten() + 4, minlength=around.numel()).to(torch.int32)

    patch.setattr(statistics, "accumulate", accumulate)


def load_update_rounded_up(patch: pytest.MonkeyPatch) -> None:
    """The load is updated by whole blocks, the last one beyond the end."""

    def fold(self: LoadWindow, counts: Tensor) -> None:
        rounded = -(-counts.numel() // BLOCK) * BLOCK
        padded = torch.nn.functional.pad(counts, (0, rounded - counts.numel()))
        load = self._load.as_strided((rounded,), (1,), self._load.storage_offset())
        load.copy_(load * self._decay + padded)

    patch.setattr(LoadWindow, "fold", fold)


def rest_not_routed(patch: pytest.MonkeyPatch) -> None:
    """Tables are read up to the last whole block."""
    route = RouteTables.route

    def blocks_only(self: RouteTables, ids: Tensor, **options: Any) -> Tensor:
        return route(self, torch.where(ids < whole_blocks(self._count.numel()), ids, -1), **options)

    patch.setattr(RouteTables, "route", blocks_only)


def _fault(name: str, take_out: Callable[[pytest.MonkeyPatch], None], says: str) -> Fault:
    """It shows with every size."""
    return Fault(name, check_sizes, take_out, "; ".join(f"the {says.format(e)}.*" for e in EXPERTS))


FAULTS = [
    _fault("the histogram leaves a rest out", rest_not_counted, "histogram of {} experts is wrong"),
    _fault("the histogram writes out of bounds", ids_not_bounded, "histogram of {} experts writes out of bounds"),
    _fault(
        "the load update writes out of bounds", load_update_rounded_up, "load update of {} experts writes out of bounds"
    ),
    _fault("the routing leaves a rest out", rest_not_routed, "routing of {} experts is wrong"),
]
