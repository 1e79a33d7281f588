"""The updater: ready, failing, dying, stalling, late; the model waits for it at most once and goes on."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from moe_eplb.balancer.host_memory import list_segments
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.balancer.updater import Update, Updater
from moe_eplb.core import planner as planner_module
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import Kind, NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan, plan
from tests.support.balanced import Rig
from tests.support.ranks import run_ranks


class OpenRanges(NullSink):
    """Counts ranges that were begun and not ended."""

    def __init__(self) -> None:
        self.open: dict[int, Kind] = {}
        self._next = 0

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self._next += 1
        self.open[self._next] = kind
        return self._next

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        del self.open[token]


def stage(made: Plan) -> StagedWeights:
    return StagedWeights(bytes=len(made.changed))


def update(layer: int = 0) -> Update:
    current = Placement(1, 2, np.array([0, 1, 0], dtype=np.int32))
    return Update(layer, 4, 5, np.array([1.0, 9.0]), current, stage)


@contextmanager
def running(timeout_s: float = 5.0, sink: NullSink | None = None) -> Iterator[Updater]:
    updater = Updater(sink or NullSink(), timeout_s=timeout_s)
    updater.start()
    yield updater
    updater.stop()


class Gate(threading.Event):
    """Set when open; `reached` when a plan stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()


@contextmanager
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Plans block until the gate opens, which happens at the latest when the block is left."""
    gate = Gate()

    def wait_and_plan(*args: Any, **kwargs: Any) -> Plan:
        gate.reached.set()
        gate.wait(60)
        return plan(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(planner_module, "plan", wait_and_plan)
        try:
            yield gate
        finally:
            gate.set()


def test_an_update_becomes_a_plan_with_staged_weights() -> None:
    with running() as updater:
        task = update()
        updater.submit(task)
        assert updater.wait(task)
    assert task.plan is not None
    assert task.plan.placement.replica_count.tolist() == [1, 2]
    assert task.staged == StagedWeights(bytes=len(task.plan.changed))


@pytest.mark.parametrize("where", ["plan", "stage"])
def test_an_exception_is_kept_logged_and_survived(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = OpenRanges()
    with running(sink=sink) as updater:
        task = update(3)
        if where == "plan":
            task.load = np.array([1.0])  # as many experts as the placement has not
        else:
            task.stage = lambda _: 1 / 0  # type: ignore[assignment, return-value]
        updater.submit(task)
        assert not updater.wait(task)
        assert "layer 3: the update taken in iteration 4 failed" in caplog.text
        good = update()
        updater.submit(good)
        assert updater.wait(good)
    assert sink.open == {}


def test_a_dead_thread_is_noticed_at_once_and_later_updates_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planner_module, "plan", lambda *_, **__: sys.exit("killed"))
    updater = Updater(NullSink(), timeout_s=30.0)
    updater.start()
    first, second = update(0), update(1)
    started = time.monotonic()
    updater.submit(first)
    assert not updater.wait(first)
    assert isinstance(first.error, SystemExit)
    updater._thread.join(10)
    updater.submit(second)
    assert not updater.wait(second)
    assert time.monotonic() - started < 10
    assert "updater dead" in caplog.text
    updater.stop()


def test_failures_of_a_layer_in_a_row_are_told_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    with running() as updater:
        for number in range(1, 21):
            for layer in (0, 1):
                task = update(layer)
                if layer == 0 or number == 1:
                    task.stage = lambda _: 1 / 0  # type: ignore[assignment, return-value]
                updater.submit(task)
                assert updater.wait(task) is (layer == 1 and number > 1)
    told = [record.getMessage() for record in caplog.records]
    assert [message.startswith("layer 0") for message in told] == [True, False, *[True] * 5]
    assert [message.partition("; the ")[2] for message in told[-2:]] == ["8th in a row", "16th in a row"]


def test_a_stalled_updater_is_waited_for_once_until_it_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(timeout_s=0.3) as updater, blocked(monkeypatch) as gate:
        tasks = [update(layer) for layer in range(5)]
        started = time.monotonic()
        for task in tasks:
            updater.submit(task)
            assert not updater.wait(task)
        assert 0.25 < time.monotonic() - started < 0.3 * 3
        assert "is not ready after 0.3 s (updater alive)" in caplog.text
        gate.set()
        assert tasks[-1].done.wait(10)
        late = update()
        updater.submit(late)
        assert updater.wait(late)


def test_updates_given_up_meanwhile_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as updater, blocked(monkeypatch) as gate:
        busy, given_up = update(), update()
        updater.submit(busy)
        assert gate.reached.wait(10)
        updater.submit(given_up)
        given_up.agreed = False
        gate.set()
        assert given_up.done.wait(10)
    assert busy.plan is not None
    assert given_up.plan is None


def test_stop_twice_and_without_a_start() -> None:
    Updater(NullSink(), timeout_s=1.0).stop()
    with running() as updater:
        updater.stop()


def test_a_thread_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    updater = Updater(NullSink(), timeout_s=0.1)
    updater.start()
    with blocked(monkeypatch) as gate:
        updater.submit(update())
        assert gate.reached.wait(10)
        with pytest.raises(BalancerError, match=r"still running 0.1 s") as info:
            updater.stop()
    assert info.value.code == "E138"
    updater._thread.join(10)


# -- within a balancer ---------------------------------------------------------------------------------------------


def _segments(rig: Rig) -> list[str]:
    return [s.name for s in list_segments() if rig.balancer.instance in s.name]


def test_a_model_goes_on_with_its_placement_when_plans_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(2, updates=2, empty_group="never")
    rig.iterate(3)
    good = rig.placements()
    with monkeypatch.context() as patch:
        patch.setattr(planner_module, "plan", lambda *_, **__: 1 / 0)
        rig.iterate(1)  # commits what was taken before, takes what will fail
        good = rig.placements()
        rig.iterate(3)
    assert rig.placements() == good
    assert "failed: ZeroDivisionError" in caplog.text
    assert "the ranks did not agree on the plan (ready on 0 of 1 ranks)" in caplog.text
    rig.assert_weights_match()
    rig.iterate(3)
    rig.balancer.shutdown()
    assert rig.journal.commits[-1][1:] == (8, 9)


def test_a_killed_updater_leaves_a_model_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(2, updates=2, empty_group="never", update_timeout_s=30.0)
    monkeypatch.setattr(planner_module, "plan", lambda *_, **__: sys.exit(0))
    before, started = rig.placements(), time.monotonic()
    rig.iterate(6)
    rig.balancer.shutdown()
    assert time.monotonic() - started < 15
    assert rig.placements() == before
    assert rig.journal.commits == []
    assert len(rig.journal.drops) == 6 + 5  # layer 0 is voted on in the iteration of its hand-over
    rig.assert_weights_match()


def test_a_stalled_updater_costs_one_wait_and_shutdown_says_so_without_leaking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(3, updates=3, empty_group="never", update_timeout_s=1.0)
    assert len(_segments(rig)) == 3
    with blocked(monkeypatch):
        started = time.monotonic()
        rig.iterate(5)
        assert time.monotonic() - started < 2.0
        with pytest.raises(BalancerError, match="E138"):
            rig.balancer.shutdown()
        assert _segments(rig) == []
    rig.balancer.shutdown()
    assert rig.journal.commits == []


def test_shutdown_with_an_update_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(2, updates=2, commit_delay=2, empty_group="never")
    with blocked(monkeypatch) as gate:
        rig.balancer.start_iter()
        for index in range(2):
            rig.run_layer(index)
        assert gate.reached.wait(10)
        timer = threading.Timer(0.1, gate.set)
        timer.start()
        rig.balancer.shutdown()
        timer.join()
    assert _segments(rig) == []
    assert not [t for t in threading.enumerate() if t is rig.balancer.updater._thread]


def _slow_on_rank_one(rank: int, size: int, timeout_s: float) -> tuple[float, list[Any], list[Any], list[list[int]]]:
    import torch.distributed as dist

    from moe_eplb.balancer import AllReduce

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    assert isinstance(statistics, dist.ProcessGroup)
    rig = Rig(2, updates=2, rank=rank, ranks=size, group=setup, empty_group="never", update_timeout_s=timeout_s)
    gate = threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Plan:
        gate.wait(60)
        return plan(*args, **kwargs)

    if rank == 1:
        planner_module.plan = slow  # type: ignore[attr-defined]
    started = time.monotonic()
    rig.iterate(3, AllReduce(statistics))
    seconds = time.monotonic() - started
    drops, during = list(rig.journal.drops), list(rig.journal.commits)
    gate.set()
    if rank == 1:
        pending = rig.layers[1].updates.pending
        assert pending is not None
        assert pending.done.wait(30)
    dist.barrier()
    rig.iterate(3, AllReduce(statistics))
    rig.assert_weights_match()
    rig.balancer.shutdown()
    assert during == []
    assert rig.journal.commits
    return seconds, drops, rig.journal.commits, rig.placements()


def test_one_slow_rank_of_two_makes_both_drop_the_plan_and_both_recover() -> None:
    first, second = run_ranks(_slow_on_rank_one, 2, 0.4)
    assert max(first[0], second[0]) < 3.0
    assert first[1:] == second[1:]
    assert [(layer, when) for layer, when, _ in first[1][:5]] == [(0, 0), (1, 1), (0, 1), (1, 2), (0, 2)]


def _other_plan_on_rank_one(rank: int, size: int) -> tuple[list[Any], list[Any], list[list[int]], str]:
    import torch.distributed as dist

    from moe_eplb.balancer import AllReduce

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    assert isinstance(statistics, dist.ProcessGroup)
    if rank == 1:
        planner_module.plan = lambda load, current, **kw: plan(load[::-1].copy(), current, **kw)  # type: ignore
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_eplb").addHandler(handler)
    rig = Rig(2, updates=2, rank=rank, ranks=size, group=setup, empty_group="never")
    before = rig.placements()
    rig.iterate(3, AllReduce(statistics))
    rig.assert_weights_match()
    rig.balancer.shutdown()
    assert rig.placements() == before
    return rig.journal.commits, rig.journal.drops, rig.placements(), messages[0]


def test_ranks_whose_plans_differ_drop_them_and_say_that_digests_differ() -> None:
    first, second = run_ranks(_other_plan_on_rank_one, 2)
    assert first == second
    assert first[0] == []
    assert len(first[1]) >= 4
    assert "digests differ" in first[3]
