from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement, balancedness


def placement(ranks: int, experts: int, *slots: int) -> Placement:
    return Placement(ranks, experts, np.array(slots, dtype=np.int32))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    ranks, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    slots = ranks * draw(st.integers(-(-experts // ranks), -(-experts // ranks) + 3))
    extra = draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts))
    return placement(ranks, experts, *draw(st.permutations([*range(experts), *extra])))


def test_tables_group_slots_by_expert_in_rank_order() -> None:
    found = placement(2, 3, 2, 0, 1, 0, 0, 2)
    assert found.replica_count.tolist() == [3, 1, 2]
    assert found.start_offset.tolist() == [0, 3, 4]
    assert found.slot_ids.tolist() == [1, 3, 4, 2, 0, 5]
    assert {table.dtype for table in (found.replica_count, found.start_offset, found.slot_ids)} == {np.dtype("int32")}
    assert (found.slots, found.slots_per_rank, found.rank_slots(1)) == (6, 3, slice(3, 6))


@settings(max_examples=60, deadline=None)
@given(placements())
def test_the_tables_lead_from_an_expert_to_exactly_its_slots(found: Placement) -> None:
    for expert in range(found.experts):
        first = found.start_offset[expert]
        slots = found.slot_ids[first : first + found.replica_count[expert]]
        assert slots.tolist() == [s for s, held in enumerate(found.slot_to_expert) if held == expert]


@settings(max_examples=60, deadline=None)
@given(placements(), st.data())
def test_rank_loads_add_up_to_the_load(found: Placement, data: st.DataObject) -> None:
    load = np.array(data.draw(st.lists(st.integers(0, 10**6), min_size=found.experts, max_size=found.experts)))
    per_rank = found.rank_load(load)
    assert per_rank.shape == (found.ranks,)
    assert per_rank.dtype == np.float64
    np.testing.assert_allclose(per_rank.sum(), load.sum(), rtol=1e-12)
    by_hand = [
        sum(load[e] / found.replica_count[e] for e in found.slot_to_expert[found.rank_slots(rank)])
        for rank in range(found.ranks)
    ]
    np.testing.assert_allclose(per_rank, by_hand, rtol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "experts", "slots", "code", "hint"),
    [
        (3, 4, [0, 1, 2, 3, 0, 1, 2], "E131", "use 6 slots"),
        (2, 4, [0, 1, 2, 3, 0], "E131", "use 4 slots"),
        (4, 6, [0, 1, 2, 3], "E131", "use 8 slots"),
        (2, 3, [0, 1, 2, 3], "E132", ""),
        (2, 3, [0, 1, 2, -1], "E132", ""),
        (2, 3, [0, 0, 2, 2], "E132", "at least one slot"),
    ],
)
def test_what_is_no_placement_is_refused(ranks: int, experts: int, slots: list[int], code: str, hint: str) -> None:
    with pytest.raises(BalancerError) as caught:
        placement(ranks, experts, *slots)
    assert caught.value.code == code
    assert hint in caught.value.hint
    if code == "E131":
        nearest = int(caught.value.hint.split()[1])
        assert placement(ranks, experts, *(i % experts for i in range(nearest))).slots == nearest


@pytest.mark.parametrize("given", [[0.5, 1.0], [[0, 1]], [0, 2**32 + 1]])
def test_slots_that_hold_no_expert_ids_are_refused(given: list[object]) -> None:
    with pytest.raises(BalancerError, match="whole expert ids") as caught:
        Placement(1, 2, np.array(given))
    assert caught.value.code == "E132"


def test_a_missing_expert_is_named() -> None:
    with pytest.raises(BalancerError, match=r"experts \[1, 3\] have no slot"):
        placement(1, 4, 0, 0, 2, 2)


def test_a_placement_neither_follows_its_source_nor_can_be_changed() -> None:
    source = np.array([0, 1, 2, 0], dtype=np.int32)
    found = Placement(2, 3, source)
    source[0] = 2
    assert found.slot_to_expert.tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="read-only"):
        found.slot_to_expert[0] = 1


def test_changed_slots_are_those_with_another_expert() -> None:
    before, after = placement(2, 3, 0, 1, 2, 0), placement(2, 3, 0, 2, 1, 0)
    assert after.changed_slots(before).tolist() == [1, 2]
    assert before.changed_slots(before).tolist() == []


def test_the_digest_tells_placements_apart() -> None:
    one = placement(2, 3, 0, 1, 2, 0)
    others = (placement(2, 3, 0, 1, 2, 1), placement(2, 3, 1, 0, 2, 0), placement(4, 3, 0, 1, 2, 0))
    assert one.digest() == placement(2, 3, 0, 1, 2, 0).digest()
    assert len({one.digest(), *(other.digest() for other in others)}) == 4
    assert all(0 <= other.digest() < 2**40 for other in others)


def test_the_digest_is_the_same_in_another_process() -> None:
    program = (
        "import numpy as np\nfrom moe_eplb.core.placement import Placement\n"
        "print(Placement(2, 3, np.array([0, 1, 2, 0])).digest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(other.stdout) == placement(2, 3, 0, 1, 2, 0).digest()


def test_balancedness_is_the_mean_over_the_most_loaded_rank() -> None:
    by_layer_and_rank = np.array([[100, 200], [100, 200]])
    assert balancedness(by_layer_and_rank).tolist() == [0.75, 0.75]


def test_equal_ranks_and_idle_ranks_are_balanced() -> None:
    assert balancedness(np.array([[7.0, 7.0, 7.0], [0.0, 0.0, 0.0]])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_one_rank_with_all_the_load_is_as_unbalanced_as_can_be(ranks: int) -> None:
    load = np.zeros(ranks)
    load[-1] = 5
    assert float(balancedness(load)) == pytest.approx(1 / ranks)
