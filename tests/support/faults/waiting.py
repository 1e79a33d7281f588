"""Waits that end: an updater that never finishes or has died, a model that never runs what it began."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from moe_eplb.balancer import MoeLoadBalancer
from moe_eplb.balancer.updater import Update, Updater
from moe_eplb.core import planner as planner_module
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.planner import Plan, plan
from tests.support.balanced import Rig
from tests.support.faults.base import Fault, demand, within

__all__ = ["FAULTS"]

SHORT_S, LONG_S = 0.2, 30.0


def make_rig(timeout_s: float) -> Rig:
    return Rig(2, updates=2, empty_group="never", update_timeout_s=timeout_s)


def demand_last_good(rig: Rig, before: list[list[int]]) -> None:
    demand(rig.placements() == before and rig.journal.commits == [], "the last good placement stays")
    rig.assert_weights_match()


class Gate(threading.Event):
    """Stands in for the planner and lets nothing through until it is set; `reached` when a plan stands before it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        self.reached.set()
        self.wait(60)
        return plan(*args, **kwargs)


def with_gate(check: Callable[[Gate], None]) -> None:
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "plan", gate.plan)
        try:
            check(gate)
        finally:
            gate.set()


def check_stalled() -> None:
    """An updater that never finishes costs one timeout; the model goes on where it is."""

    def check(gate: Gate) -> None:
        rig = make_rig(SHORT_S)
        before = rig.placements()
        try:
            raised = within(lambda: rig.iterate(4), "the model waits for a stalled updater", release=gate.set)
            demand(raised is None, f"the model fails with its updater: {raised!r}")
            demand_last_good(rig, before)
        finally:
            gate.set()
            rig.balancer.shutdown()

    with_gate(check)


def check_dead() -> None:
    """An updater whose thread is gone without a word is not waited for at all, however long the timeout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "_serve", lambda self: None)
        rig = make_rig(LONG_S)
    rig.balancer.updater._thread.join(10)
    go_on_without_updater(rig, "the model waits for an updater that is dead")


def check_killed() -> None:
    """An updater that is killed in the middle of a plan is noticed by whoever waits for that plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner_module, "plan", lambda *_, **__: sys.exit("killed"))
        go_on_without_updater(make_rig(LONG_S), "the model waits for an updater that was killed")


def go_on_without_updater(rig: Rig, otherwise: str) -> None:
    def give_up() -> None:
        for layer in rig.layers:
            if layer.updates.pending is not None:
                layer.updates.pending.done.set()

    before = rig.placements()
    try:
        raised = within(lambda: rig.iterate(4), otherwise, release=give_up)
        demand(raised is None, f"the model fails with its updater: {raised!r}")
        demand_last_good(rig, before)
    finally:
        rig.balancer.shutdown()


def check_shutdown_of_a_stalled_updater() -> None:
    """Shutdown waits for the timeout at most, says what holds it, and removes the host copies all the same."""

    def check(gate: Gate) -> None:
        rig = make_rig(SHORT_S)
        rig.balancer.start_iter()
        for index in range(2):
            rig.run_layer(index)
        demand(gate.reached.wait(10), "a plan is under way")
        try:
            raised = within(rig.balancer.shutdown, "shutdown waits for a stalled updater", release=gate.set)
            demand(isinstance(raised, BalancerError) and raised.code == "E138", f"shutdown does not tell: {raised!r}")
        finally:
            gate.set()
            rig.balancer.updater._thread.join(10)
            rig.balancer.shutdown()

    with_gate(check)


def check_shutdown_within_an_iteration() -> None:
    """Shutdown does not wait for layers of a begun iteration that will never run."""
    rig = make_rig(LONG_S)
    rig.balancer.start_iter()
    rig.run_layer(0)
    raised = within(rig.balancer.shutdown, "shutdown waits for an iteration that is not run", release=lambda: end(rig))
    demand(raised is None, f"shutdown fails: {raised!r}")


def end(rig: Rig) -> None:
    if rig.balancer._iter.in_iter:
        rig.balancer.abort_iter()


# -- the reference's waits -------------------------------------------------------------------------------------------


def endless_wait(patch: pytest.MonkeyPatch) -> None:
    """Whoever needs an update waits until it is there."""

    def wait(self: Updater, update: Update) -> bool:
        update.done.wait()
        return update.error is None

    patch.setattr(Updater, "wait", wait)


def death_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """The timeout is waited for, whether the thread lives or not."""
    patch.setattr(Updater, "_patience", lambda self: self._timeout_s)


def unguarded_thread(patch: pytest.MonkeyPatch) -> None:
    """A thread that is killed tells nobody, and whoever waits for it waits until it is done."""

    def serve(self: Updater) -> None:
        while (update := self._tasks.get()) is not None:
            self._prepare(update)
            update.done.set()

    patch.setattr(threading, "excepthook", lambda _: None)  # the death is meant to go unnoticed
    patch.setattr(Updater, "_serve", serve)
    endless_wait(patch)


def endless_stop(patch: pytest.MonkeyPatch) -> None:
    """The thread is joined, however long that takes."""

    def stop(self: Updater) -> None:
        self._tasks.put(None)
        self._thread.join()

    patch.setattr(Updater, "stop", stop)


def shutdown_drains(patch: pytest.MonkeyPatch) -> None:
    """The worker drains its queue: an iteration that was begun must be run first."""
    shutdown = MoeLoadBalancer.shutdown

    def drain(self: MoeLoadBalancer) -> None:
        while self._iter.in_iter:
            time.sleep(0.005)
        shutdown(self)

    patch.setattr(MoeLoadBalancer, "shutdown", drain)


FAULTS = [
    Fault(
        "the model waits without end for an updater that never finishes", check_stalled, endless_wait,
        "the model waits for a stalled updater",
    ),
    Fault(
        "the model waits without end for a dead updater", check_dead, endless_wait,
        "the model waits for an updater that is dead",
    ),
    Fault(
        "the model waits the timeout for every update of a dead updater", check_dead, death_unnoticed,
        "the model waits for an updater that is dead",
    ),
    Fault(
        "an updater killed within a plan is waited for", check_killed, unguarded_thread,
        "the model waits for an updater that was killed",
    ),
    Fault(
        "shutdown waits without end for the updater", check_shutdown_of_a_stalled_updater, endless_stop,
        "shutdown waits for a stalled updater",
    ),
    Fault(
        "shutdown waits without end for the model", check_shutdown_within_an_iteration, shutdown_drains,
        "shutdown waits for an iteration that is not run",
    ),
]  # fmt: skip
