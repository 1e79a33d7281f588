"""A host enqueues what waits for a plan only behind the plan's own copies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_eplb.balancer.resident import Resident
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.balancer.updater import Update
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from tests.support.balanced import Rig

TIMEOUT_S = 0.2


@pytest.fixture
def resident() -> Resident:
    return Resident(get_device("cpu", NullSink()), 2, run_ahead=2, timeout_s=TIMEOUT_S)


def an_update(due: int = 3) -> Update:
    placement: Any = SimpleNamespace()
    stage: Any = None
    return Update(0, due - 2, due, np.zeros(4), placement, stage)


def timed(resident: Resident, update: Update) -> float:
    begun = time.monotonic()
    resident.await_plan(update)
    return time.monotonic() - begun


def test_a_plan_that_is_done_is_not_waited_for(resident: Resident) -> None:
    update = an_update()
    update.done.set()
    assert timed(resident, update) < TIMEOUT_S / 2
    assert resident.plan_waits == 0
    assert update.waited_s == 0


def test_the_host_goes_on_when_the_plan_is_done(resident: Resident) -> None:
    update = an_update()
    timer = threading.Timer(TIMEOUT_S / 4, update.done.set)
    timer.start()
    assert TIMEOUT_S / 5 < (took := timed(resident, update)) < TIMEOUT_S
    timer.join()
    assert resident.plan_waits == 1
    assert TIMEOUT_S / 5 < update.waited_s <= took


def test_after_a_wait_in_vain_nobody_waits_until_that_plan_is_done(resident: Resident) -> None:
    late = an_update()
    assert timed(resident, late) >= TIMEOUT_S * 0.9
    assert timed(resident, an_update(4)) < TIMEOUT_S / 2
    assert resident.plan_waits == 1
    late.done.set()
    assert timed(resident, an_update(5)) >= TIMEOUT_S * 0.9, "there is somebody at work again"
    assert resident.plan_waits == 2


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(resident=True, layers=3, updates=3, commit_delay=2, update_timeout_s=TIMEOUT_S)
    yield made
    made.balancer.shutdown()


def awaited_in(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer, iteration of its plan) of plans that are awaited from here on, by a device that works later."""
    found: list[tuple[int, int]] = []

    def note(layer: ResidentLayer, iteration: int) -> None:
        found.append((layer.layer_idx, layer._due_of_vote(iteration)))

    monkeypatch.setattr(ResidentLayer, "await_plan", note)
    monkeypatch.setattr(type(rig.balancer.device), "immediate", False)
    return found


def flying(rig: Rig) -> list[int]:
    return [len(layer._flying) for layer in rig.layers if isinstance(layer, ResidentLayer)]


def test_before_a_replay_the_plans_that_it_votes_on_are_awaited(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        rig.iterate()
    awaited = awaited_in(rig, monkeypatch)
    monkeypatch.setattr(rig.balancer.updater, "submit", lambda update: None)  # whose load nobody hands over here
    rig.balancer.start_iter()
    with rig.balancer.replaying():
        assert awaited == [(0, 3), (1, 2), (2, 2)], "the last layer carries the vote on the first one's next plan"
        before = flying(rig)
    handed = [b - a for a, b in zip(before, flying(rig), strict=True)]
    assert handed == [1, 1, 1], "each hands its load over"
    rig.balancer.end_iter()


def test_plans_that_a_launched_graph_may_still_wait_for_are_awaited_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = rig.layers[1]
    assert isinstance(layer, ResidentLayer)
    awaited: list[int] = []
    monkeypatch.setattr(Resident, "await_plan", lambda resident, update: awaited.append(update.due))
    monkeypatch.setattr(layer, "_flying", {due: an_update(due) for due in (4, 5, 6)}, raising=False)
    layer.await_plan(5)
    assert awaited == [4, 5]
    layer._flying.clear()


def test_launched_work_awaits_the_plan_that_its_vote_waits_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.iterate(2)
    awaited = awaited_in(rig, monkeypatch)
    rig.iterate()
    assert awaited == [(1, 2), (2, 2), (0, 3)]


def test_a_vote_on_all_plans_at_once_awaits_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(
        resident=True, layers=3, updates=3, commit_delay=3, update_timeout_s=TIMEOUT_S, reduction="iteration"
    )  # fmt: skip
    try:
        rig.iterate(2)
        awaited = awaited_in(rig, monkeypatch)
        rig.iterate()
        assert awaited == [(0, 3), (1, 3), (2, 3)]
    finally:
        rig.balancer.shutdown()


def test_a_device_that_works_at_once_waits_by_itself(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited = awaited_in(rig, monkeypatch)
    monkeypatch.setattr(type(rig.balancer.device), "immediate", True)
    rig.iterate(3)
    assert awaited == []
