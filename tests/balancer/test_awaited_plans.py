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


def test_the_host_goes_on_when_the_plan_is_done(resident: Resident) -> None:
    update = an_update()
    timer = threading.Timer(TIMEOUT_S / 4, update.done.set)
    timer.start()
    assert timed(resident, update) < TIMEOUT_S
    timer.join()
    assert resident.plan_waits == 1


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


def test_before_a_replay_the_plans_that_it_votes_on_are_awaited(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        rig.iterate()
    awaited: list[tuple[int, int]] = []
    monkeypatch.setattr(ResidentLayer, "await_plan", lambda layer, due: awaited.append((layer.layer_idx, due)))
    rig.balancer.start_iter()
    with rig.balancer.replaying():
        assert awaited == [(0, 3), (1, 2), (2, 2)], "the last layer carries the vote on the first one's next plan"
        expected = [len(layer._flying) for layer in rig.layers if isinstance(layer, ResidentLayer)]
    after = [len(layer._flying) for layer in rig.layers if isinstance(layer, ResidentLayer)]
    assert [b - a for a, b in zip(expected, after, strict=True)] == [1, 1, 1], "each hands its load over"
    rig.balancer.end_iter()


def test_launched_work_awaits_the_plan_that_its_vote_waits_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.iterate()
    awaited: list[tuple[int, int]] = []
    monkeypatch.setattr(ResidentLayer, "await_plan", lambda layer, due: awaited.append((layer.layer_idx, due)))
    rig.iterate()
    assert awaited == [], "a device that works at once waits by itself"
    monkeypatch.setattr(type(rig.balancer.device), "immediate", False)
    monkeypatch.setattr(type(rig.balancer.device), "capturing", False, raising=False)
    rig.iterate()
    assert awaited == [(1, 2), (2, 2), (0, 3)]
