"""Who holds which expert at the start, before anything moves: what some workloads are aimed at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_eplb.core import planner

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["home_ranks", "initial_slots", "on_rank", "only_on_rank"]


def initial_slots(scenario: Scenario, layer: int) -> np.ndarray:
    """int32 [P]: the expert of each slot of a layer: the scenario's own assignment, else the planner's."""
    given = scenario.balancer.initial_global_assignments if scenario.balancer else None
    if given:
        return np.array(given[layer], dtype=np.int32)
    return planner.initial_slots(scenario.model.experts, scenario.ranks, scenario.slots_per_rank)


def on_rank(scenario: Scenario, layer: int, rank: int) -> np.ndarray:
    """bool [E]: the experts that a rank holds."""
    held: np.ndarray = _holds(scenario, layer)[rank]
    return held


def only_on_rank(scenario: Scenario, layer: int, rank: int) -> np.ndarray:
    """bool [E]: the experts that a rank holds and no other rank does."""
    holds = _holds(scenario, layer)
    alone: np.ndarray = holds[rank] & (holds.sum(axis=0) == 1)
    return alone


def home_ranks(scenario: Scenario, layer: int) -> np.ndarray:
    """int64 [E]: the rank of each expert's first slot."""
    slots = initial_slots(scenario, layer)
    first = np.unique(slots, return_index=True)[1]
    homes: np.ndarray = first // scenario.slots_per_rank
    return homes


def _holds(scenario: Scenario, layer: int) -> np.ndarray:
    """bool [R, E]."""
    slots = initial_slots(scenario, layer).reshape(scenario.ranks, -1)
    holds = np.zeros((scenario.ranks, scenario.model.experts), dtype=np.bool_)
    holds[np.arange(scenario.ranks)[:, None], slots] = True
    return holds
