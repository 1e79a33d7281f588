"""A placement scored as a decode step feels it: by the weights that a rank must read, not by its tokens.

With few tokens a step's time goes by how many different experts they touch on a rank, each of which is read once, so
that a replica of an expert is work too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.problem import Loads, Problem, Slots

__all__ = ["DecodeScore", "score_decode", "touched_slots"]


@dataclass(frozen=True, slots=True)
class DecodeScore:
    """What a decode step reads.

    Attributes:
        pairs: Routed (token, k) pairs of a step, of all ranks together.
        touched: Slots that the rank with most of them is expected to read in a layer, mean over layers.
        balancedness: Sum over layers of the ranks' mean of these / sum of the largest.
        read_us: us of all layers of a step, each as long as its worst rank reads.
    """

    pairs: int
    touched: float
    balancedness: float
    read_us: float


def touched_slots(problem: Problem, slots: Slots, load: Loads, pairs: int) -> Loads:
    """Slots of each rank [L, R] that a step of so many independent routed pairs is expected to touch.

    A pair goes to an expert with its share of the load [L, E] and to each of its replicas alike; a slot that gets one
    with probability q is touched with 1 - (1 - q) ** pairs.
    """
    layers, experts = load.shape
    whole = load.sum(axis=1, keepdims=True)
    chance = np.divide(load, whole, out=np.zeros_like(load), where=whole > 0)
    held = slots >= 0
    flat = np.where(held, slots, 0) + np.arange(layers)[:, np.newaxis] * experts
    counts = np.bincount(flat[held], minlength=layers * experts)
    each = np.where(held, (chance.reshape(-1) / np.maximum(counts, 1))[flat], 0.0)
    with np.errstate(divide="ignore"):
        touched = -np.expm1(pairs * np.log1p(-each))
    before = np.concatenate([np.zeros((layers, 1)), np.cumsum(touched, axis=1)], axis=1)
    found: Loads = np.diff(before[:, problem.first_slot], axis=1)
    return found


def score_decode(problem: Problem, slots: Slots, pairs: int, slot_bytes: int, memory_gb_s: float) -> DecodeScore:
    """The score on the newest window.

    Raises:
        UsageError: E189 `pairs` is below 1.
    """
    if pairs < 1:
        raise UsageError(
            "E189", f"a decode step of {pairs} routed pairs reads nothing", hint="tokens x top-k, 1 or more"
        )
    touched = touched_slots(problem, slots, problem.newest, pairs)
    largest = touched.max(axis=1)
    means = touched.sum(axis=1) / max(int((problem.room > 0).sum()), 1)
    whole = float(largest.sum())
    return DecodeScore(
        pairs, float(largest.mean()), float(means.sum()) / whole if whole > 0 else 1.0,
        whole * slot_bytes / (memory_gb_s * 1e3),
    )  # fmt: skip
