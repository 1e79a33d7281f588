from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.schedule import UpdateSchedule, update_groups


@pytest.mark.parametrize(
    ("layers", "updates", "groups"),
    [
        (4, 3, ((0, 2), (1, 3), ())),
        (5, 2, ((0, 3), (1, 4), (2,))),
        (3, 1, ((0,), (1,), (2,), ())),
        (3, 3, ((0, 1, 2), ())),
        (3, 8, ((0, 1, 2), ())),
        (3, 0, ()),
        (0, 2, ()),
    ],
)
def test_groups_are_those_of_the_reference(layers: int, updates: int, groups: tuple[tuple[int, ...], ...]) -> None:
    assert update_groups(layers, updates) == groups


@pytest.mark.parametrize(("layers", "updates", "iterations"), [(58, 1, 59), (58, 2, 30), (61, 10, 7)])
def test_a_cycle_takes_as_many_iterations_as_in_the_reference(layers: int, updates: int, iterations: int) -> None:
    assert len(update_groups(layers, updates)) == iterations


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 64), st.integers(1, 70))
def test_a_cycle_updates_every_layer_once_and_never_too_many(layers: int, updates: int) -> None:
    groups = update_groups(layers, updates, empty_group="never")
    assert sorted(layer for group in groups for layer in group) == list(range(layers))
    assert all(1 <= len(group) <= updates for group in groups)
    assert len(groups) == -(-layers // updates)
    extra = ((),) if len(groups[0]) == len(groups[-1]) else ()
    assert update_groups(layers, updates) == groups + extra


def test_iterations_go_round_the_groups() -> None:
    schedule = UpdateSchedule(4, 2, empty_group="reference")
    assert [schedule.begin(i) for i in range(5)] == [(0, 2), (1, 3), (), (0, 2), (1, 3)]


def test_warm_up_iterations_do_not_use_up_a_turn() -> None:
    schedule = UpdateSchedule(2, 1, empty_group="never")
    schedule.warm_up_until = 1
    assert [schedule.begin(i) for i in range(4)] == [(), (), (0,), (1,)]


def test_a_warm_up_in_the_middle_holds_the_turn() -> None:
    schedule = UpdateSchedule(2, 1, empty_group="never")
    first = schedule.begin(0)
    schedule.warm_up_until = 2
    assert (first, schedule.begin(1), schedule.begin(2), schedule.begin(3)) == ((0,), (), (), (1,))


def test_static_routing_updates_nothing() -> None:
    schedule = UpdateSchedule(4, 0)
    assert [schedule.begin(i) for i in range(3)] == [(), (), ()]
