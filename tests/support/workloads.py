"""Small scenarios with a workload of a kind, and what all ranks ask for in them."""

from __future__ import annotations

import numpy as np

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import workload
from moe_eplb.core.scenario import Scenario

# For every kind that is drawn, keys that make it differ from being uniform.
DRAWN = {
    "balanced": "",
    "uniform": "",
    "zipf": "skew: 1.2, drift_every: 3",
    "hot": "hot_experts: 3, hot_share: 0.7, drift_every: 5",
    "hot_rank": "hot_rank: 1, hot_share: 0.7",
    "spread_hot": "hot_experts: 4, hot_share: 0.7",
    "idle": "idle_experts: 2, idle_rank: 0",
    "rotating": "hot_experts: 3, hot_share: 0.7, drift_every: 2",
    "burst": "burst_every: 4, burst_factor: 3, hot_experts: 2, hot_share: 0.8",
}


def make(
    work: str, *, experts: int = 16, top_k: int = 4, ranks: int = 2, seed: int = 0, layers: int = 2,
    iterations: int = 12, balancer: str = "null",
) -> Scenario:  # fmt: skip
    """A scenario around the text of a workload."""
    text = (
        f"{{ranks: {ranks}, seed: {seed}, iterations: {iterations}, balancer: {balancer}, workload: {work}, "
        f"model: {{layers: {layers}, experts: {experts}, top_k: {top_k}}}}}"
    )
    return scenarios.loads(text, "test.yaml")


def of_kind(kind: str, more: str = "", **sizes: int) -> Scenario:
    """A scenario whose workload is of a drawn kind."""
    return make("{" + ", ".join(part for part in (f"kind: {kind}", DRAWN[kind], more) if part) + "}", **sizes)


def ids(scenario: Scenario, iteration: int = 0, layer: int = 0, rank: int = 0, repeat: int = 0) -> np.ndarray:
    """The ids int32 [T, K] of a workload that has some."""
    chosen = workload.topk_ids(scenario, iteration, layer, rank, repeat)
    assert chosen is not None
    return chosen


def counts(scenario: Scenario, iteration: int = 0, layer: int = 0, repeat: int = 0) -> np.ndarray:
    """Entries int64 [E] by expert, of all ranks."""
    chosen = [ids(scenario, iteration, layer, rank, repeat).ravel() for rank in range(scenario.ranks)]
    return np.bincount(np.concatenate(chosen), minlength=scenario.model.experts)
