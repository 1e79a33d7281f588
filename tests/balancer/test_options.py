"""Defaults and limits of the balancer's options."""

from __future__ import annotations

from typing import Any

import pytest

from moe_eplb.balancer import BalancerOptions, ReplicaChoice
from moe_eplb.core.errors import BalancerError
from tests.support.balanced import Rig


def test_defaults_are_the_references() -> None:
    options = BalancerOptions()
    assert (options.commit_delay, options.decay, options.window) == (1, 0.95, 1)
    assert options.empty_group == "reference"
    assert options.replica_choice is ReplicaChoice.ROUND_ROBIN


@pytest.mark.parametrize(
    "wrong",
    [
        {"commit_delay": 0}, {"window": 0}, {"decay": -0.1}, {"decay": 1.01}, {"update_timeout_s": 0.0},
        {"decay": float("nan")}, {"update_timeout_s": float("nan")}, {"update_timeout_s": float("inf")},
        {"min_gain": -0.01}, {"min_gain": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused_with_the_number(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(BalancerError, match=f"E148(.|\n)*{name} {value}"):
        BalancerOptions(**wrong)


def test_limits_themselves_are_fine() -> None:
    BalancerOptions(commit_delay=1, window=1, decay=0.0)
    BalancerOptions(decay=1.0)


def loads(**options: Any) -> list[float]:
    """The load of one layer's experts after two iterations."""
    rig = Rig(2, **options)
    rig.balancer.set_iter_info(True, False)
    rig.iterate(2)
    rig.balancer.shutdown()
    taken: list[float] = rig.layers[0]._statistics.load.take().tolist()
    return taken


def test_decay_and_window_reach_the_load() -> None:
    plain, halved, forgetful, averaged = (
        loads(decay=1.0),
        loads(decay=0.5),
        loads(decay=0.0),
        loads(decay=0.0, window=2),
    )
    first = [a - b for a, b in zip(plain, forgetful, strict=True)]
    assert any(first)
    assert halved == [a / 2 + b for a, b in zip(first, forgetful, strict=True)]
    assert averaged == [(a + b) / 2 for a, b in zip(first, forgetful, strict=True)]


def test_preserve_slots_saves_moves() -> None:
    changed = {}
    for preserve in (True, False):
        rig = Rig(2, 16, 2, slots_per_rank=20, updates=2, empty_group="never", preserve_slots=preserve)
        initial = rig.placements()[0]
        rig.iterate(2)
        rig.balancer.shutdown()
        now = rig.placements()[0]
        changed[preserve] = sum(a != b for a, b in zip(initial, now, strict=True))
        rig.assert_weights_match()
    assert 0 < changed[True] < changed[False]


def test_replica_choice_reaches_the_routing() -> None:
    for choice in ReplicaChoice:
        rig = Rig(2, 4, 2, slots_per_rank=4, ranks=2, rank=1, updates=0, replica_choice=choice)
        slots = rig.layers[0].route(rig.ids(0, 0))
        assert bool((slots >= 4).all()) == (choice is ReplicaChoice.LOCAL_FIRST)


def test_empty_group_reaches_the_schedule() -> None:
    for empty_group, commits in (("reference", 3), ("never", 5)):
        rig = Rig(2, updates=2, empty_group=empty_group)
        rig.iterate(6)
        rig.balancer.shutdown()
        assert len([when for layer, _, when in rig.journal.commits if layer == 1]) == commits
