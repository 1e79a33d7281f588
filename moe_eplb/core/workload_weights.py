"""How much each expert is asked for, by the kind of workload."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from moe_eplb.core import workload_start
from moe_eplb.core.workload_tokens import is_burst

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["LEAST", "expert_weights"]

LEAST = 1e-300
"""Weight of an expert that nobody prefers: it is chosen only when no other is left."""

_ORDER = 1  # keeps this use of the seed apart from the draws of tokens and experts


def expert_weights(scenario: Scenario, iteration: int, layer: int) -> np.ndarray:
    """Weights float64 [E] of a drawn workload, in no particular unit. An expert of weight 0 is never chosen."""
    work, experts = scenario.workload, scenario.model.experts
    weights = np.ones(experts)
    if work.kind == "zipf":
        weights = np.maximum(np.arange(1, experts + 1, dtype=np.float64) ** -work.skew, LEAST)
        weights = weights[_heat(scenario, iteration, layer)]
    elif work.kind == "idle":
        weights[_idle(scenario, layer)] = 0
    elif (hot := _hot(scenario, iteration, layer)) is not None and not hot.all():
        many = int(hot.sum())
        weights[hot] = work.hot_share / many
        weights[~hot] = max((1 - work.hot_share) / (experts - many), LEAST)
    return weights


def _hot(scenario: Scenario, iteration: int, layer: int) -> np.ndarray | None:
    """bool [E]: the experts that share `hot_share`; None where all are alike."""
    work, experts = scenario.workload, scenario.model.experts
    heat = _heat(scenario, iteration, layer)
    hot: np.ndarray | None = None
    match work.kind:
        case "hot":
            hot = heat < work.hot_experts
        case "burst" if is_burst(scenario, iteration):
            hot = heat < work.hot_experts
        case "rotating":
            first = iteration // max(1, work.drift_every) * work.hot_experts
            hot = (heat - first) % experts < work.hot_experts
        case "hot_rank":
            hot = workload_start.on_rank(scenario, layer, work.hot_rank)
        case "spread_hot":
            hot = _spread_out(workload_start.home_ranks(scenario, layer), heat, work.hot_experts)
    return hot


def _spread_out(homes: np.ndarray, heat: np.ndarray, many: int) -> np.ndarray:
    """bool [E]: `many` experts, one of each home rank in turn, those of a rank from the hottest on."""
    by_home = np.lexsort((heat, homes))
    turn = np.empty(len(homes), dtype=np.int64)
    turn[by_home] = np.arange(len(homes)) - np.searchsorted(homes[by_home], homes[by_home])
    chosen = np.zeros(len(homes), dtype=np.bool_)
    chosen[np.lexsort((heat, turn))[:many]] = True
    return chosen


def _idle(scenario: Scenario, layer: int) -> np.ndarray:
    """bool [E]: what `idle_rank` alone holds, and `idle_experts` others."""
    work = scenario.workload
    idle = np.zeros(scenario.model.experts, dtype=np.bool_)
    if work.idle_rank is not None:
        idle |= workload_start.only_on_rank(scenario, layer, work.idle_rank)
    coldest = np.argsort(np.where(idle, -1, _heat(scenario, 0, layer)))[::-1]
    idle[coldest[: work.idle_experts]] = True
    return idle


def _heat(scenario: Scenario, iteration: int, layer: int) -> np.ndarray:
    """int64 [E]: each expert's place in the order from hot to cold, which zipf and hot draw anew as they drift."""
    work = scenario.workload
    drifts = work.kind in ("zipf", "hot") and work.drift_every
    epoch = iteration // work.drift_every if drifts else 0
    return _order(scenario.seed, epoch, layer, scenario.model.experts)


@functools.lru_cache(maxsize=256)
def _order(seed: int, epoch: int, layer: int, experts: int) -> np.ndarray:
    order = np.random.default_rng([seed, _ORDER, epoch, layer]).permutation(experts)
    order.flags.writeable = False
    return order
