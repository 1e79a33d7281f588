"""Which experts each token asks for: a pure function of (seed, iteration, layer, rank), the same on every rank."""

from __future__ import annotations

import functools
import os

import numpy as np

from moe_eplb.core import recorded
from moe_eplb.core.scenario_model import Scenario

__all__ = ["expert_weights", "tokens", "topk_ids"]

_ORDER, _DRAW = 1, 2  # keeps the two uses of one seed apart
_NEVER = 1e-300  # weight of an expert that nobody asks for: it is chosen only when no other is left


def tokens(scenario: Scenario, iteration: int, rank: int) -> int:
    """T, the tokens of a rank in an iteration."""
    return scenario.tokens(rank)


def topk_ids(scenario: Scenario, iteration: int, layer: int, rank: int) -> np.ndarray | None:
    """The chosen experts, int32 [T, K], distinct in every row; None when the model's router is to choose.

    Recorded ids are handed out in order: an iteration takes the next tokens of the file and the ranks share them in
    order. Everything else is drawn without replacement in proportion to `expert_weights`, by the exponential-race form
    of the Gumbel top-k trick (Efraimidis and Spirakis 2006).
    """
    kind, count, k = scenario.workload.kind, tokens(scenario, iteration, rank), scenario.model.top_k
    if kind == "model":
        return None
    if kind == "recorded":
        ids = _recorded_ids(*_file(scenario), scenario.workload.order)
        if ids is not None:
            start = sum(tokens(scenario, iteration, r) for r in range(scenario.ranks)) * iteration
            start += sum(tokens(scenario, iteration, r) for r in range(rank))
            return np.array(ids[start : start + count, layer])
    rng = np.random.default_rng([scenario.seed, _DRAW, iteration, layer, rank])
    return _draw(rng, expert_weights(scenario, iteration, layer), count, k)


def expert_weights(scenario: Scenario, iteration: int, layer: int) -> np.ndarray:
    """How much each expert is asked for, float64 [E], positive, in no particular unit."""
    work, experts = scenario.workload, scenario.model.experts
    if work.kind == "recorded":
        counts = _recorded(*_file(scenario)).counts
        assert counts is not None, "recorded ids have no weights"
        window: np.ndarray = counts[iteration % len(counts), layer].astype(np.float64)
        return window.clip(min=_NEVER)
    weights = np.ones(experts)
    if work.kind == "zipf":
        weights = np.arange(1, experts + 1, dtype=np.float64) ** -work.skew
    if work.kind == "hot" and work.hot_experts < experts:
        weights[: work.hot_experts] = work.hot_share / work.hot_experts
        weights[work.hot_experts :] = (1 - work.hot_share) / (experts - work.hot_experts)
    epoch = iteration // work.drift_every if work.drift_every else 0
    shuffled: np.ndarray = np.maximum(weights, _NEVER)[_order(scenario.seed, epoch, layer, experts)]
    return shuffled


def _draw(rng: np.random.Generator, weights: np.ndarray, count: int, k: int) -> np.ndarray:
    arrival = rng.standard_exponential((count, len(weights))) / weights
    first = np.argpartition(arrival, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(arrival, first, axis=1), axis=1, kind="stable")
    return np.ascontiguousarray(np.take_along_axis(first, order, axis=1).astype(np.int32))


@functools.lru_cache(maxsize=256)
def _order(seed: int, epoch: int, layer: int, experts: int) -> np.ndarray:
    order = np.random.default_rng([seed, _ORDER, epoch, layer]).permutation(experts)
    order.flags.writeable = False
    return order


def _file(scenario: Scenario) -> tuple[str, int]:
    """Path and time of change, because a process may outlive a file's content."""
    path = scenario.workload.path or ""
    return path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0


@functools.lru_cache(maxsize=4)
def _recorded(path: str, changed: int) -> recorded.Recorded:
    return recorded.load(path)


@functools.lru_cache(maxsize=4)
def _recorded_ids(path: str, changed: int, order: str) -> np.ndarray | None:
    file = _recorded(path, changed)
    return None if file.topk_ids is None else recorded.in_order(file, order)
