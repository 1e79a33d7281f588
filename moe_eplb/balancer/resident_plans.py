"""The plans of one layer that are under way beside a device that holds its state: handed over, awaited, noted."""

from __future__ import annotations

from moe_eplb.balancer.plan_notes import PlanNotes
from moe_eplb.balancer.resident import Resident
from moe_eplb.balancer.resident_update import Publisher, ResidentUpdate
from moe_eplb.balancer.single_layer import SingleLayerMoeLoadBalancer
from moe_eplb.core.probe import Probe
from moe_eplb.device import Device
from moe_eplb.device.control import LayerState, Outcome, Report

__all__ = ["ResidentPlans"]


class ResidentPlans(SingleLayerMoeLoadBalancer):
    """What the host does earlier or later than the layer runs; `ResidentLayer` adds what is done while it runs.

    Attributes:
        resident: What it shares with the other layers; there from `finish_setup` on, as what follows.
        state: Its state on the device.
    """

    resident: Resident
    state: LayerState
    _publisher: Publisher
    _notes: PlanNotes
    _flying: dict[int, ResidentUpdate]
    """By the iteration in which they are due."""

    @property
    def device(self) -> Device:
        """Where the layer runs."""
        return self._device

    @property
    def probe(self) -> Probe:
        """Who watches now."""
        return self._owner.probe

    def expect(self, iteration: int) -> None:
        """The hand-over of a layer whose turn it is has been enqueued: let the updater wait for it."""
        self.resident.expected += 1
        update = ResidentUpdate(
            self.layer_idx, iteration, iteration + self._owner.options.commit_delay, self.state.handed_load.numpy(),
            self.placement, self._publisher.stage, publisher=self._publisher, owner=self, ring=self.resident.expected,
        )  # fmt: skip
        self._flying[update.due] = update
        if self._owner.updater.alive:
            self._owner.updater.submit(update)
        else:
            update.error = RuntimeError("the updater is dead")
            update.give_up()

    def await_plan(self, iteration: int) -> None:
        """Return when what the device waits for to vote on the layer's plan is enqueued; see `Resident`.

        Args:
            iteration: In which it votes.
        """
        # Those due before too: a graph that has been launched may still be waiting for one, and as long as it does the
        # next one must not fill the queue.
        for due, update in self._flying.items():
            if due <= self._due_of_vote(iteration):
                self.resident.await_plan(update)

    def _due_of_vote(self, iteration: int) -> int:
        """In which iteration the plan is due on which ranks vote in this one: the last layer votes on the first's."""
        return iteration + (self.layer_idx == 0)

    def collect_until(self, iteration: int) -> None:
        """Take note of what the device has done with all plans due in an iteration that has ended, or before."""
        if self._flying:
            for due in sorted(due for due in self._flying if due <= iteration):
                self.collect(due)

    def collect(self, iteration: int) -> None:
        """Take note of what the device has done with the plan that was due in an iteration."""
        update = self._flying.get(iteration)
        if update is None:
            return
        report = self.resident.report(self.layer_idx, iteration)
        if report[Report.DUE] != iteration or report[Report.OUTCOME] == Outcome.NONE:
            return
        del self._flying[iteration]
        for older in [due for due in self._flying if due < iteration]:
            del self._flying[older]  # turns in which the layer kept its load
        if report[Report.VOTED] not in (iteration - 1, iteration):
            self._drop(iteration, 0, False, f"due in iteration {iteration}, but nobody voted on it")
            return
        if report[Report.READY_HERE] == 1:
            # The device may act on what was published before the updater's thread has come to tell that it is done.
            update.done.wait(self._owner.options.update_timeout_s)
        self._notes.planned(update, report)
        update.agreed = report[Report.OUTCOME] == Outcome.COMMITTED
        if update.agreed:
            self._committed(update, iteration)
        else:
            differ, ready = report[Report.DIGESTS_DIFFER] == 1, report[Report.READY_RANKS]
            self._drop(iteration, ready, differ, "the ranks did not agree on the plan")

    def _drop(self, due: int, ready: int, differ: bool, reason: str) -> None:
        """All ranks learn of it in the same iteration."""
        self._owner.updater.forget(self.layer_idx)
        self._notes.dropped(due, ready, differ, reason)

    def _committed(self, update: ResidentUpdate, iteration: int) -> None:
        if update.plan is not None:
            self.updates.placement = update.plan.placement
            self.updates.version += 1
        self._notes.committed(update, iteration)

    def give_all_up(self, iteration: int) -> None:
        """An iteration was aborted, and the device has stopped."""
        model, at = self.resident.model, self.layer_idx
        pending = int(model.due[at])
        model.due[at] = model.decision[at] = -1
        for due, update in self._flying.items():
            update.agreed = False
            if due == pending:
                self._notes.dropped(due, 0, False, f"iteration {iteration} was aborted")
        self._flying.clear()
