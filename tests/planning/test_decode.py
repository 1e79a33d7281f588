"""What a decode step reads, against every way that its pairs can be routed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.certificate import Links, certify
from moe_eplb.planning.decode import score_decode, touched_slots
from moe_eplb.planning.problem import EMPTY, Problem, Solution


def _by_enumeration(slots: list[int], chance: list[float], ranks: int, pairs: int) -> list[float]:
    """Slots that each rank is expected to read, over all sequences of slots that pairs can go to."""
    size, counts = len(slots) // ranks, [slots.count(expert) for expert in range(len(chance))]
    each = [chance[expert] / counts[expert] if expert >= 0 else 0.0 for expert in slots]
    found = [0.0] * ranks
    for way in itertools.product(range(len(slots)), repeat=pairs):
        likely = math.prod(each[slot] for slot in way)
        for slot in set(way):
            found[slot // size] += likely
    return found


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_touched_slots_are_those_of_every_way(pairs: int) -> None:
    load = np.array([[5.0, 3.0, 0.0, 2.0], [0.0, 10.0, 0.0, 0.0]])
    slots = np.array([[0, 1, 2, 0, 3, 1], [0, 1, 2, 0, 3, 1]], np.int32)
    problem = Problem(load, 2, 6)
    found = touched_slots(problem, slots, load, pairs)
    for layer in range(2):
        chance = (load[layer] / load[layer].sum()).tolist()
        assert found[layer] == pytest.approx(_by_enumeration(slots[layer].tolist(), chance, 2, pairs))


def test_empty_slots_and_layers_without_load_read_nothing() -> None:
    load = np.array([[1.0, 1.0], [0.0, 0.0]])
    slots = np.array([[0, 1, EMPTY, EMPTY]] * 2, np.int32)
    problem = Problem(load, 2, 4, masked_ranks=(1,))
    assert touched_slots(problem, slots, load, 10_000).tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_one_expert_that_gets_every_pair_is_read_surely() -> None:
    problem = Problem(np.array([[7.0, 0.0]]), 2, 2)
    score = score_decode(problem, np.array([[0, 1]], np.int32), 3, slot_bytes=2_000_000, memory_gb_s=1000.0)
    assert (score.touched, score.balancedness, score.read_us) == (1.0, 0.5, 2.0)


def test_a_certificate_scores_decode_when_it_is_asked_to() -> None:
    problem = Problem(np.ones((1, 4)), 2, 4)
    plan = Solution("x", np.array([[0, 1, 2, 3]], np.int32), 0.0)
    assert certify(problem, plan).decode is None
    found = certify(problem, plan, Links(slot_bytes=1_000_000, memory_gb_s=1.0), decode_pairs=10**9).decode
    assert found is not None
    assert found.read_us == pytest.approx(2000.0)
    with pytest.raises(UsageError, match="reads nothing") as caught:
        certify(problem, plan, decode_pairs=0)
    assert caught.value.code == "E189"
