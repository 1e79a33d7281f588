"""The pending update of one layer: taken, planned by the updater, agreed on by the ranks, committed or dropped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from moe_eplb.balancer import agreement
from moe_eplb.balancer.agreement import Outcome
from moe_eplb.balancer.drop_log import DropLog
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.balancer.migrate import SlotWeights, StagedWeights
from moe_eplb.balancer.statistics import LoadWindow
from moe_eplb.balancer.updater import Update
from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan

if TYPE_CHECKING:
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer

__all__ = ["LayerUpdate"]


class LayerUpdate:
    """Placement, weights and the one update under way of a layer. All but `_stage` runs on the model's thread."""

    def __init__(self, owner: MoeLoadBalancer, layer: int, placement: Placement) -> None:
        self._owner, self._layer = owner, layer
        self.placement = placement
        self.version = 0
        self.pending: Update | None = None
        self._log = DropLog(layer)
        self.slots = SlotWeights(self._layer, placement.slots_per_rank)
        self.host = HostMoeTensorSharer(
            self._layer, placement.experts, rank=owner.ep_rank, ranks=owner.ep_size,
            instance=owner.instance, group=owner.group,
        )  # fmt: skip

    def take(self, iteration: int, load: LoadWindow) -> None:
        """Hand the layer's load to the updater; the plan is due `commit_delay` iterations later."""
        due = iteration + self._owner.options.commit_delay
        self.pending = Update(self._layer, iteration, due, load.take(), self.placement, self._stage)
        self._owner.updater.submit(self.pending)

    def lanes_digest(self) -> int | None:
        """What this rank votes with: its plan's digest, None if the plan is not ready in time."""
        update = self.pending
        if update is None or not self._wait(update) or update.plan is None or update.staged is None:
            return None
        plan = update.plan
        self._owner.probe.planned(self._layer, update.taken, update.due, plan, update.staged.bytes)
        return agreement.plan_digest(self._layer, update.due, plan.placement.digest())

    def _wait(self, update: Update) -> bool:
        """Whether the update is ready. Here alone the model may wait for the updater."""
        if update.done.is_set():
            return self._owner.updater.wait(update)
        began = time.monotonic()
        ready = self._owner.updater.wait(update)
        self._owner.probe.stalled(self._layer, time.monotonic() - began)
        return ready

    def settle(self, result: Outcome) -> None:
        """The ranks have voted: agreed if every rank was ready with the same digest, else all drop the plan."""
        if self.pending is None:
            return
        self.pending.agreed = result.ready == self._owner.ep_size and not result.digests_differ
        if not self.pending.agreed:
            self._drop(result.ready, result.digests_differ, "the ranks did not agree on the plan")

    def commit_due(self, iteration: int) -> bool:
        """Commit the agreed plan of this iteration. Whether the placement is a new one."""
        update = self.pending
        if update is None or update.due > iteration:
            return False
        if not update.agreed or update.due < iteration or update.plan is None or update.staged is None:
            self._drop(0, False, f"due in iteration {update.due}, not agreed on before iteration {iteration}")
            return False
        self._commit(update, update.plan, update.staged, iteration)
        return True

    def abort(self, iteration: int, *, begun: bool) -> bool:
        """Leave an aborted iteration as every rank does, whatever its streams had done. Whether the placement is new.

        Where the layer had begun, another rank may have committed what was due; nothing else that is pending survives.
        """
        committed = begun and self.commit_due(iteration)
        if self.pending is not None:
            self._drop(0, False, f"iteration {iteration} was aborted")
        return committed

    def _commit(self, update: Update, plan: Plan, staged: StagedWeights, iteration: int) -> None:
        sink = self._owner.device.sink
        token = sink.begin(Kind.COMMIT, self._layer, iteration, self._owner.device.current.index)
        self.slots.write(staged)
        self.placement = plan.placement
        self.version += 1
        self.pending = None
        self._log.committed()
        sink.end(token, a=len(plan.changed), b=plan.placement.digest())
        self._owner.probe.copied(self._layer, staged.by_source)
        self._owner.probe.committed(self._layer, update.taken, plan.placement, plan.changed, staged.bytes)

    def _drop(self, ready: int, digests_differ: bool, reason: str) -> None:
        assert self.pending is not None
        self.pending.agreed = False
        due, self.pending = self.pending.due, None
        self._owner.updater.forget(self._layer)
        iteration = self._owner.device.iteration
        self._log.dropped(due, iteration, reason, ready=ready, ranks=self._owner.ep_size, differ=digests_differ)
        self._owner.device.sink.mark(
            Kind.PLAN_DROPPED, self._layer, iteration, self._owner.device.current.index, ready, int(digests_differ)
        )
        self._owner.probe.dropped(self._layer, due, ready, digests_differ, reason)

    def _stage(self, plan: Plan) -> StagedWeights:
        """Copy this rank's part of the plan from the host (on the updater's thread)."""
        mine = plan.placement.rank_slots(self._owner.ep_rank)
        changes = [
            (int(slot) - mine.start, int(plan.placement.slot_to_expert[slot]))
            for slot in plan.changed
            if mine.start <= slot < mine.stop
        ]
        return self.slots.stage(changes, self.host)
