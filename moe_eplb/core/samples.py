"""What samples of variants say about each other: medians, tails, and ratios with the interval they are known to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_COST", "Compared", "Difference", "Gain", "compare", "gain", "paired_difference"]

_RESAMPLED = 2000
LEAST_COST = 1.3
"""So much longer must static placements take than balanced routing for a gain to tell anything."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A variant against the first one, and against the one before it.

    Attributes:
        steps: Samples.
        median_ms, p99_ms: Of all its samples.
        ratio: Median over rounds of (median of its round / median of the first variant's round).
        low, high: The 95 % interval of `ratio`.
        step_ratio, step_low, step_high: The same against the variant before, 1 for the first.
    """

    steps: int
    median_ms: float
    p99_ms: float
    ratio: float
    low: float
    high: float
    step_ratio: float
    step_low: float
    step_high: float


def compare(samples_ms: Sequence[Sequence[Sequence[float]]], *, seed: int = 0) -> list[Compared]:
    """Compare samples by variant, round and step; rounds of the same number are pairs.

    The interval is a percentile bootstrap over rounds (Efron 1979), since steps of a round are not independent.
    """
    medians = np.array([[np.median(steps) for steps in rounds] for rounds in samples_ms])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, medians.shape[1], (_RESAMPLED, medians.shape[1]))
    compared = []
    for variant, rounds in enumerate(samples_ms):
        every = np.concatenate([np.asarray(steps, dtype=np.float64) for steps in rounds])
        p50, p99 = np.percentile(every, (50, 99))
        to_first = _ratio(medians[variant] / medians[0], drawn)
        to_previous = _ratio(medians[variant] / medians[max(variant - 1, 0)], drawn)
        compared.append(Compared(len(every), float(p50), float(p99), *to_first, *to_previous))
    return compared


def _ratio(ratios: NDArray[np.float64], drawn: NDArray[np.int64]) -> tuple[float, float, float]:
    """Median of ratios [rounds] and its interval, from resamples [N, rounds] of them."""
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


@dataclass(frozen=True, slots=True)
class Gain:
    """What balancing wins back of the time that imbalance costs, everything counted from the first step on.

    Attributes:
        static_ms, dynamic_ms, balanced_ms: Of all steps, without moves, with them, and with uniform routing.
        cost: static / balanced.
        share: (static - dynamic) / (static - balanced); 1 is as good as uniform routing.
        low, high: The 95 % interval of `share`.
    """

    static_ms: float
    dynamic_ms: float
    balanced_ms: float
    cost: float
    share: float
    low: float
    high: float

    @property
    def tells(self) -> bool:
        """Whether imbalance costs enough for `share` to be more than noise divided by noise."""
        return self.cost >= LEAST_COST


def gain(samples_ms: Sequence[Sequence[Sequence[float]]], *, seed: int = 0) -> Gain:
    """The gain from samples of the variants static, dynamic and balanced, by round and step.

    Sums and not medians: what the first moves and their plans cost lies in few steps. For the interval see `compare`.
    """
    rounds = np.array([[np.sum(steps) for steps in of_variant] for of_variant in samples_ms])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, rounds.shape[1], (_RESAMPLED, rounds.shape[1]))
    low, high = np.percentile(_share(*rounds[:, drawn].sum(axis=2)), (2.5, 97.5))
    static, dynamic, balanced = rounds.sum(axis=1)
    return Gain(
        float(static), float(dynamic), float(balanced), float(static / balanced),
        float(_share(static, dynamic, balanced)), float(low), float(high),
    )  # fmt: skip


def _share(
    static: NDArray[np.float64], dynamic: NDArray[np.float64], balanced: NDArray[np.float64]
) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: NDArray[np.float64] = (static - dynamic) / (static - balanced)
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Median of the differences of pairs, and its 95 % interval, in the unit of the samples."""

    median: float
    low: float
    high: float


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """How much larger the second of each pair is than the first; at least one pair.

    The interval is a percentile bootstrap over pairs (Efron 1979).
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(differences), (_RESAMPLED, len(differences)))
    low, high = np.percentile(np.median(differences[drawn], axis=1), (2.5, 97.5))
    return Difference(float(np.median(differences)), float(low), float(high))
