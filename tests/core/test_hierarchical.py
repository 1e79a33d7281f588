from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.hierarchical import rebalance_experts
from moe_eplb.core.placement import Placement

PUBLISHED = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
GRADED = [10, 20, 30, 40, 50, 60]
SIXTEEN = [50, 100, 75, 120, 90, 60, 80, 110, 40, 70, 95, 85, 65, 55, 45, 35]


def solve(load: list[int], slots: int, groups: int, nodes: int, ranks: int) -> tuple[list[int], list[float]]:
    """Replica counts and sorted rank loads of one layer."""
    phy2log, _, counts = rebalance_experts(np.array([load]), slots, groups, nodes, ranks)
    loads = Placement(ranks, len(load), phy2log[0]).rank_load(np.array(load))
    return counts[0].tolist(), sorted(loads.tolist())


def test_the_published_example_comes_out_as_published() -> None:
    phy2log, log2phy, counts = rebalance_experts(np.array(PUBLISHED), 16, 4, 2, 8)
    assert phy2log.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert counts.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    for slots, found in zip(phy2log, log2phy, strict=True):
        by_expert = [[slot for slot, held in enumerate(slots) if held == expert] for expert in range(12)]
        assert [sorted(slot for slot in row.tolist() if slot >= 0) for row in found] == by_expert


@pytest.mark.parametrize(("layer", "hierarchical", "everywhere"), [(0, 156.0, 138.5), (1, 179.5, 172.0)])
def test_the_most_loaded_rank_of_the_published_example(layer: int, hierarchical: float, everywhere: float) -> None:
    assert solve(PUBLISHED[layer], 16, 4, 2, 8)[1][-1] == hierarchical
    assert solve(PUBLISHED[layer], 16, 1, 1, 8)[1][-1] == everywhere


@pytest.mark.parametrize(
    ("load", "shape", "counts", "loads"),
    [
        ([10, 20, 30, 40], (4, 1, 1, 1), [1, 1, 1, 1], [100]),
        ([50] * 8, (8, 2, 2, 4), [1] * 8, [100] * 4),
        (GRADED, (8, 2, 2, 4), [1, 1, 2, 1, 1, 2], [30, 30, 70, 80]),
        (GRADED[::-1], (8, 2, 2, 4), [2, 1, 1, 2, 1, 1], [30, 30, 70, 80]),
        ([10, 20, 30, 40], (8, 3, 2, 4), [1, 2, 2, 3], [70 / 3, 25, 25, 80 / 3]),
        ([100, 50, 200, 75, 150, 25, 300, 80], (12, 4, 2, 4), [1, 1, 2, 1, 2, 1, 3, 1], [200, 250, 250, 280]),
        (GRADED, (8, 3, 2, 4), [1, 1, 1, 1, 2, 2], [50, 50, 55, 55]),
        ([10, 20, 30, 40], (6, 2, 1, 2), [1, 1, 2, 2], [50, 50]),
        (SIXTEEN, (24, 8, 4, 8), None, [135, 140, 145, 145, 150, 150, 155, 155]),
        ([200, 150, 100, 50, 25, 12], (10, 3, 1, 2), [3, 2, 2, 1, 1, 1], [266 + 2 / 3, 270 + 1 / 3]),
        ([600, 560, 120, 120, 20, 10, 10, 10], (16, 1, 1, 8), None, None),
    ],
)
def test_other_examples_have_the_known_counts_and_loads(
    load: list[int], shape: tuple[int, int, int, int], counts: list[int] | None, loads: list[float] | None
) -> None:
    found_counts, found_loads = solve(load, *shape)
    assert counts is None or found_counts == counts
    if loads is None:
        assert found_loads[-1] == 232
    else:
        assert found_loads == pytest.approx(loads)


def test_one_hot_expert_gets_the_replicas() -> None:
    counts, loads = solve([1000, *[1] * 7], 12, 2, 2, 4)
    assert counts[0] == 3
    assert loads[-1] == pytest.approx(667.667, abs=1e-3)


def test_equal_loads_of_a_layer_are_shared_equally() -> None:
    assert solve([25] * 6, 8, 2, 2, 4)[1] == [37.5] * 4


def test_one_slot_on_each_rank_keeps_the_order_of_the_experts() -> None:
    assert rebalance_experts(np.array([[10, 40, 20, 30]]), 4, 1, 1, 4)[0].tolist() == [[0, 1, 2, 3]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_result_is_a_placement_that_keeps_groups_on_nodes(data: st.DataObject) -> None:
    nodes, ranks_per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    groups, group_size = nodes * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    experts, ranks = groups * group_size, nodes * ranks_per_node
    slots = ranks * (-(-experts // ranks) + data.draw(st.integers(0, 2)))
    loads = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    weight = np.array(data.draw(st.lists(loads, min_size=1, max_size=3)))
    phy2log, log2phy, counts = rebalance_experts(weight, slots, groups, nodes, ranks)
    for layer, row in enumerate(phy2log):
        assert Placement(ranks, experts, row).replica_count.tolist() == counts[layer].tolist()
        assert (log2phy[layer] >= 0).sum(axis=1).tolist() == counts[layer].tolist()
        node_of = {(int(expert) // group_size, slot * nodes // slots) for slot, expert in enumerate(row)}
        assert len(node_of) == groups
        for expert, places in enumerate(log2phy[layer]):
            assert all(row[slot] == expert for slot in places[places >= 0])


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((7, 3, 2, 4), "7 slots do not fit 4 experts on 4 ranks"),
        ((2, 1, 1, 2), "2 slots do not fit 4 experts"),
        ((8, 3, 3, 4), "do not fit together"),
        ((6, 2, 2, 3), "do not fit together"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(shape: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(BalancerError, match=words) as caught:
        rebalance_experts(np.array([[10, 20, 30, 40]]), *shape)
    assert caught.value.code == "E131"
    assert caught.value.hint
