"""Which experts each token asks for: a pure function of (seed, iteration, layer, rank), the same on every rank."""

from __future__ import annotations

import functools
import math
import os
from typing import TYPE_CHECKING

import numpy as np

from moe_eplb.core import recorded
from moe_eplb.core.workload_tokens import tokens, tokens_before
from moe_eplb.core.workload_weights import LEAST, expert_weights

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["expert_weights", "is_drawn", "tokens", "topk_ids"]

# Keep the uses of one seed apart.
_DRAW, _DEAL = 2, 4


def is_drawn(scenario: Scenario) -> bool:
    """Whether the ids follow from the scenario alone, so that anybody can draw them again."""
    return scenario.workload.kind not in ("model", "recorded")


def topk_ids(scenario: Scenario, iteration: int, layer: int, rank: int, repeat: int = 0) -> np.ndarray | None:
    """The chosen experts, int32 [T, K], distinct in every row; None when the model's router is to choose.

    `repeat` counts the runs of a layer that runs more than once in an iteration: each draws anew, but a recorded file
    says the same to all of them.
    """
    match scenario.workload.kind:
        case "model":
            return None
        case "recorded":
            return _recorded_ids(scenario, iteration, layer, rank)
        case "balanced":
            return _deal(scenario, iteration, layer, rank, repeat)
        case _:
            weights = expert_weights(scenario, iteration, layer)
            return _draw(scenario, iteration, layer, rank, weights, repeat)


def _draw(
    scenario: Scenario, iteration: int, layer: int, rank: int, weights: np.ndarray, repeat: int = 0
) -> np.ndarray:
    """Draw without replacement in proportion to the weights, by the exponential-race form of the Gumbel top-k trick
    (Efraimidis and Spirakis 2006)."""
    seed = [scenario.seed, _DRAW, iteration, layer, rank, repeat]
    rng = np.random.default_rng(seed if repeat else seed[:-1])
    asked, k = np.flatnonzero(weights), scenario.model.top_k
    arrival = rng.standard_exponential((tokens(scenario, iteration, rank), len(asked))) / weights[asked]
    first = np.argpartition(arrival, k - 1, axis=1)[:, :k]
    order = np.argsort(np.take_along_axis(arrival, first, axis=1), axis=1, kind="stable")
    return np.ascontiguousarray(asked[np.take_along_axis(first, order, axis=1)].astype(np.int32))


def _deal(scenario: Scenario, iteration: int, layer: int, rank: int, repeat: int) -> np.ndarray:
    """Deal the experts out in turn over the tokens of all ranks, in rounds after which all were dealt equally often.

    Each round has an order of its own. Within one, a token's experts are neighbours in the order and so distinct.
    """
    experts, k = scenario.model.experts, scenario.model.top_k
    ends = np.cumsum([tokens(scenario, iteration, r) for r in range(scenario.ranks)])
    size = experts // math.gcd(experts, k)  # tokens of a round
    rng = np.random.default_rng([scenario.seed, _DEAL, iteration, layer, repeat])
    orders = rng.permuted(np.tile(np.arange(experts, dtype=np.int32), (-(-int(ends[-1]) // size), 1)), axis=1)
    token = np.arange(ends[rank] - tokens(scenario, iteration, rank), ends[rank])[:, None]
    dealt: np.ndarray = orders[token // size, (token % size * k + np.arange(k)) % experts]
    return dealt


def _recorded_ids(scenario: Scenario, iteration: int, layer: int, rank: int) -> np.ndarray:
    """The file's ids in order, of which an iteration takes the next and the ranks share them in order, or ids drawn in
    proportion to the file's counts."""
    file = _file(scenario)
    ids = _ids_in_order(*file, scenario.workload.order)
    if ids is None:
        counts = _recorded(*file).counts
        assert counts is not None, "a recorded file holds ids or counts"
        window = counts[iteration % len(counts), layer].astype(np.float64)
        return _draw(scenario, iteration, layer, rank, window.clip(min=LEAST))
    start = tokens_before(scenario, iteration) + sum(tokens(scenario, iteration, r) for r in range(rank))
    return np.array(ids[start : start + tokens(scenario, iteration, rank), layer])


def _file(scenario: Scenario) -> tuple[str, int]:
    """Path and time of change, because a process may outlive a file's content."""
    path = scenario.workload.path or ""
    return path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0


@functools.lru_cache(maxsize=4)
def _recorded(path: str, changed: int) -> recorded.Recorded:
    return recorded.load(path)


@functools.lru_cache(maxsize=4)
def _ids_in_order(path: str, changed: int, order: str) -> np.ndarray | None:
    file = _recorded(path, changed)
    return None if file.topk_ids is None else recorded.in_order(file, order)
