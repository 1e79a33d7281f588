"""What goes wrong beside a state on the device leaves the balancer working, and says so."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_eplb.balancer import AllReduce, MoeLoadBalancerIterContext
from moe_eplb.balancer.drop_log import is_told
from moe_eplb.balancer.updater import Update, Updater
from moe_eplb.core.errors import BalancerError
from moe_eplb.device import control
from moe_eplb.device.copier import CopierAtOnce
from moe_eplb.planning.online import Planner
from tests.support.balanced import Rig
from tests.support.ranks import run_ranks

TIMEOUT_S = 0.4


@pytest.fixture
def rig() -> Any:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(resident=True, update_timeout_s=TIMEOUT_S, **options))
        return made[-1]

    yield make
    for one in made:
        one.balancer.shutdown()


def test_an_exception_behind_a_launch_costs_the_plans_under_way_and_no_others(rig: Callable[..., Rig]) -> None:
    made = rig(layers=2, updates=2, commit_delay=2, empty_group="never")
    balancer = made.balancer
    balancer.device.immediate = False
    for iteration in range(12):
        try:
            with MoeLoadBalancerIterContext(balancer), balancer.replaying():
                made.replay()
                if iteration == 3:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert iteration == 3
    balancer.collect()
    resident = made.residents()[0].resident
    assert int(resident.model.rung) == resident.expected == 24
    assert {taken for _, taken, _ in made.journal.commits} >= {4, 6, 8}, "none after it is lost"
    assert len(made.journal.drops) <= 4


def test_a_load_that_comes_too_late_makes_no_device_wait(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rig(layers=2, updates=2, commit_delay=2)
    layer = made.residents()[0]
    bell = layer.resident.bell
    monkeypatch.setattr(bell, "wait", lambda count, timeout_s: False)
    layer.expect(0)
    update = layer._flying[2]
    assert update.done.wait(5)
    assert isinstance(update.error, BalancerError)
    # The load comes after all: nobody will plan for it, and the device must not wait for a plan.
    layer.resident.model.turn[0], layer.resident.model.turn[2] = 0, 1
    control.hand_over(layer.resident.model, layer.state, delay=2)
    assert int(layer.resident.model.due[0]) == 2
    assert int(layer.resident.model.ready[0]) == 2
    assert layer.state.lanes.tolist() == [0] * 5


@pytest.mark.parametrize("failures", [2, 3])
def test_copies_that_fail_again_and_again_end_neither_updater_nor_model(
    failures: int, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = rig(layers=2, updates=2, commit_delay=2)
    made.iterate(2)
    left, enqueue = [failures], CopierAtOnce.enqueue

    def failing(copier: CopierAtOnce, *given: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the driver refuses")
        enqueue(copier, *given)

    monkeypatch.setattr(CopierAtOnce, "enqueue", failing)
    before = len(made.journal.commits)
    with caplog.at_level(logging.ERROR):
        for _ in range(12):
            made.iterate()
            made.assert_weights_match()
    assert left == [0]
    assert made.balancer.updater.alive
    assert len(made.journal.commits) > before
    assert made.journal.drops
    assert "the driver refuses" in caplog.text
    assert "could not be told that there is no plan" in caplog.text


@pytest.mark.parametrize(
    ("slow", "lacks"), [("planner", "there is no plan yet"), ("copies", "its copies are enqueued, but were not done")]
)
def test_a_plan_that_is_late_is_told_with_what_it_lacks(
    slow: str, lacks: str, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = rig(layers=2, updates=2, commit_delay=2)
    made.iterate(4)
    planner_of, release = Updater._planner_of, threading.Event()

    def held(updater: Updater, update: Update) -> Planner:
        release.wait(10)
        return planner_of(updater, update)

    if slow == "planner":
        monkeypatch.setattr(Updater, "_planner_of", held)
    else:
        monkeypatch.setattr(CopierAtOnce, "enqueue", lambda *given: None)
    drops = len(made.journal.drops)
    with caplog.at_level(logging.ERROR):
        made.iterate(4)
    release.set()
    assert len(made.journal.drops) > drops
    told = [record.getMessage() for record in caplog.records if "is not ready after" in record.getMessage()]
    assert told
    assert all(message.endswith(lacks) for message in told)


def test_plans_that_are_never_ready_do_not_fill_the_log(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = rig(layers=2, updates=2, commit_delay=2)
    enqueue = CopierAtOnce.enqueue
    monkeypatch.setattr(CopierAtOnce, "enqueue", lambda *given: None)
    made.iterate(40)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("layer 0")]
    drops = sum(layer == 0 for layer, *_ in made.journal.drops)
    assert drops >= 16
    # Each that is told has its cause before it.
    assert len(told) == 2 * sum(is_told(number) for number in range(1, drops + 1))
    assert ["dropped" in message for message in told] == [False, True] * (len(told) // 2)
    monkeypatch.setattr(CopierAtOnce, "enqueue", enqueue)
    made.iterate(8)
    made.assert_weights_match()
    assert made.journal.commits


def test_an_abort_tells_no_counts_of_layers_that_did_not_run(rig: Callable[..., Rig]) -> None:
    made = rig(layers=3, updates=3, commit_delay=2)
    made.iterate(3)
    made.balancer.device.immediate = False
    before = len(made.journal.loads)
    made.balancer.start_iter()
    made.run_layer(0)
    made.balancer.abort_iter()
    counted = torch.bincount(made.ids(0, 3).flatten(), minlength=6).tolist()
    assert made.journal.loads[before:] == [(0, counted)]


def test_a_capture_that_fails_leaves_layers_that_begin_anew(rig: Callable[..., Rig]) -> None:
    made = rig(layers=2, updates=2, commit_delay=2)
    made.iterate(4)
    layer = made.residents()[0]
    with pytest.raises(RuntimeError, match="no memory"), made.balancer.capturing():  # noqa: PT012
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_local_ids(made.ids(0, 4), True, True)
        raise RuntimeError("no memory for the graph")
    assert not layer.unfinished
    assert layer._late is None
    drops = len(made.journal.drops)
    made.iterate(3)
    assert len(made.journal.drops) == drops


# -- counts beyond int32 -----------------------------------------------------------------------------------------------


def overflowing(rig: Rig) -> None:
    """An iteration in which a layer's global counts go over."""
    with MoeLoadBalancerIterContext(rig.balancer):
        for layer in rig.layers:
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            ids = rig.ids(layer.layer_idx, rig.balancer.iter_id)
            layer.route(ids)
            layer.get_agreement_lanes()
            layer.update_statistic_with_global_ids(ids, True, False)
            layer._statistics.counts().fill_(2**31 - 1)
            layer.update_statistic_with_global_ids(ids, False, True)
            layer.start_set_cpu_stage()
            layer.done_set_cpu_stage()


@pytest.mark.parametrize("resident", [False, True])
def test_global_counts_beyond_int32_are_an_error_by_the_next_iteration(resident: bool) -> None:
    made = Rig(layers=2, resident=resident)
    try:
        made.iterate()
        with pytest.raises(BalancerError, match="E134"):  # noqa: PT012 - where the state is on the device it is told later
            overflowing(made)
            made.balancer.start_iter()
        made.iterate(3)
        assert made.balancer.iter_id >= 4
    finally:
        made.balancer.shutdown()


# -- planners that remember --------------------------------------------------------------------------------------------


def _late_once(rank: int, size: int, resident: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(layer, iteration) of what was taken for the plans that were committed, and of drops; rank 1 is late once."""
    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    assert isinstance(statistics, dist.ProcessGroup)
    rig = Rig(
        2, 12, updates=2, rank=rank, ranks=size, group=setup, slots_per_rank=8, resident=resident, policy="robust",
        commit_delay=2, update_timeout_s=TIMEOUT_S, empty_group="never",
    )  # fmt: skip
    planner_of, late = Updater._planner_of, threading.Event()

    def planned(updater: Updater, update: Update) -> Planner:
        if rank == 1 and update.taken >= 10 and not late.is_set():
            late.set()
            time.sleep(2 * TIMEOUT_S + 0.1)
        return planner_of(updater, update)

    Updater._planner_of = planned  # type: ignore[method-assign]
    for iteration in range(30):
        if iteration == 13:
            time.sleep(4 * TIMEOUT_S)  # the updater has caught up
        rig.iterate(allreduce=AllReduce(statistics))
        rig.assert_weights_match()
    rig.balancer.shutdown()
    return [commit[:2] for commit in rig.journal.commits], [drop[:2] for drop in rig.journal.drops]


@pytest.mark.parametrize("resident", [False, True])
def test_a_rank_that_was_late_once_plans_as_the_others_do_from_then_on(resident: bool) -> None:
    """A planner that remembers loads must remember the same ones on all ranks."""
    first, second = run_ranks(_late_once, 2, resident, timeout=90)
    assert first == second
    commits, drops = first
    for layer in (0, 1):
        dropped = [when for number, when in drops if number == layer]
        assert dropped, "one rank was late"
        assert max(dropped) <= min(dropped) + 4, "and later plans are agreed on"
        assert (layer, 26) in commits
