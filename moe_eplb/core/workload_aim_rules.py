"""What must hold where a workload is aimed at experts by the ranks that hold them at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from moe_eplb.core import workload_start
from moe_eplb.core.problem import Problem

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["problems"]


def problems(s: Scenario) -> Iterator[Problem]:
    """What cannot be aimed at. A start that is itself wrong is for other rules to report."""
    rules = {"hot_rank": _hot_rank, "spread_hot": _spread_hot, "idle": _idle}
    rule = rules.get(s.workload.kind)
    layers = _different_layers(s)
    if rule is None or not all(_is_legal(s, layer) for layer in layers):
        return
    for layer in layers:
        if found := list(rule(s, layer)):
            yield from found
            return


def _different_layers(s: Scenario) -> range:
    """Layers whose start may differ: all of them where the scenario assigns slots itself, else the first stands for
    all."""
    return range(s.model.layers if s.balancer and s.balancer.initial_global_assignments else 1)


def _is_legal(s: Scenario, layer: int) -> bool:
    given = s.balancer.initial_global_assignments if s.balancer else None
    if not given:
        return s.slots >= s.model.experts
    slots = given.get(layer, ())
    return len(slots) == s.slots and set(slots) == set(range(s.model.experts))


def _hot_rank(s: Scenario, layer: int) -> Iterator[Problem]:
    rank = s.workload.hot_rank
    if rank < s.ranks and workload_start.on_rank(s, layer, rank).all():
        what = f"rank {rank} holds all {s.model.experts} experts of layer {layer} at the start: none is hotter"
        yield Problem(("workload", "hot_rank"), what, "use more ranks or fewer slots, or kind 'uniform'")


def _spread_hot(s: Scenario, layer: int) -> Iterator[Problem]:
    many = s.workload.hot_experts
    held = np.bincount(workload_start.home_ranks(s, layer))
    held = held[held > 0]
    most = int(np.minimum(held, held.min() + 1).sum())
    if len(held) == 1:
        what = f"all experts of layer {layer} begin on one rank: nothing can be spread"
        yield Problem(("workload", "kind"), what, "use kind 'hot'")
    elif most < many <= s.model.experts:
        what = f"the ranks hold {', '.join(map(str, held))} experts of layer {layer} at the start: {many} hot ones"
        yield Problem(("workload", "hot_experts"), f"{what} cannot be spread evenly", f"hot_experts: {most} or less")


def _idle(s: Scenario, layer: int) -> Iterator[Problem]:
    work, experts, alone = s.workload, s.model.experts, 0
    if work.idle_rank is not None and work.idle_rank < s.ranks:
        alone = int(workload_start.only_on_rank(s, layer, work.idle_rank).sum())
        if alone == 0:
            what = f"rank {work.idle_rank} alone holds no expert of layer {layer} at the start: none becomes idle"
            yield Problem(("workload", "idle_rank"), what, "use another rank or fewer slots")
    elif work.idle_rank is None and work.idle_experts == 0:
        yield Problem(("workload", "kind"), "no expert is idle", "add 'idle_experts: 1' or 'idle_rank: 0'")
    left = experts - alone - work.idle_experts
    if left < s.model.top_k:
        what = (
            f"{max(0, left)} of {experts} experts of layer {layer} are left to be asked for, top_k is {s.model.top_k}"
        )
        key = "idle_experts" if work.idle_experts else "idle_rank"
        most = experts - alone - s.model.top_k
        yield Problem(("workload", key), what, f"idle_experts: {most} or less" if most >= 0 else "use more ranks")
