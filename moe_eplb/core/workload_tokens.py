"""How many tokens each rank has in each iteration: the only source of T."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["is_burst", "most_tokens", "spread", "tokens", "tokens_before"]

_TOKENS = 3  # keeps this use of the seed apart from the order and the draw of experts


def tokens(scenario: Scenario, iteration: int, rank: int) -> int:
    """T, the tokens of a rank in an iteration.

    A pure function of the scenario, the same on every machine. Where tokens are ragged some ranks may have none, but
    never all of them.
    """
    work = scenario.workload
    if not work.ragged:
        return _plain(scenario, iteration, rank)
    plain = tuple(_plain(scenario, iteration, r) for r in range(scenario.ranks))
    return _ragged(scenario.seed, iteration, plain, work.ragged)[rank]


def tokens_before(scenario: Scenario, iteration: int) -> int:
    """Tokens of all ranks in all iterations before this one, of a recorded workload.

    Such a workload has neither bursts nor ragged tokens, so all iterations but the first have equally many.
    """
    if iteration == 0:
        return 0
    first, later = (sum(tokens(scenario, i, rank) for rank in range(scenario.ranks)) for i in (0, 1))
    return first + (iteration - 1) * later


def most_tokens(scenario: Scenario, rank: int) -> int:
    """A bound on a rank's T over all iterations, without looking at each."""
    work, sequences = scenario.workload, scenario.sequences(rank)
    factor = work.burst_factor if work.kind == "burst" else 1
    if work.steps == "mixed":
        most = (sequences + work.prompt_tokens) * factor
    else:
        most = sequences * work.prompt_tokens * factor
    return most + spread(most, work.ragged)


def is_burst(scenario: Scenario, iteration: int) -> bool:
    """Whether a burst workload bursts: the last of every `burst_every` iterations does."""
    work = scenario.workload
    return work.kind == "burst" and (iteration + 1) % work.burst_every == 0


def _plain(scenario: Scenario, iteration: int, rank: int) -> int:
    work, sequences = scenario.workload, scenario.sequences(rank)
    if work.steps == "prefill" or (work.steps == "generate" and iteration == 0):
        step = sequences * work.prompt_tokens
    elif work.steps == "mixed" and iteration % scenario.ranks == rank:
        step = sequences + work.prompt_tokens
    else:
        step = sequences
    return step * work.burst_factor if is_burst(scenario, iteration) else step


@functools.lru_cache(maxsize=64)
def _ragged(seed: int, iteration: int, plain: tuple[int, ...], share: float) -> tuple[int, ...]:
    drawn = [_drawn(seed, iteration, rank, count, share) for rank, count in enumerate(plain)]
    having = [rank for rank, count in enumerate(plain) if count]
    if having and not any(drawn):
        kept = having[iteration % len(having)]
        drawn[kept] = plain[kept]
    return tuple(drawn)


def _drawn(seed: int, iteration: int, rank: int, count: int, share: float) -> int:
    margin = spread(count, share)
    rng = np.random.default_rng([seed, _TOKENS, iteration, rank])
    return int(rng.integers(count - margin, count + margin, endpoint=True))


def spread(count: int, share: float) -> int:
    """By how many tokens a rank's T may differ where `share` of it is ragged: floor(share * count).

    The share is taken as it is written: 0.29 of 100 are 29, which no product of floats says.
    """
    return int(Fraction(str(share)) * count)
