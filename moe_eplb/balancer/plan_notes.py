"""What became of the plans of a layer whose state lives on the device: told to the probe, the log and the records."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_eplb.balancer.drop_log import DropLog
from moe_eplb.balancer.resident_update import ResidentUpdate
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.core.probe import Probe
from moe_eplb.device.control import Report

if TYPE_CHECKING:
    from moe_eplb.balancer.resident_plans import ResidentPlans

__all__ = ["PlanNotes"]

_LOG = logging.getLogger(__name__)


class PlanNotes:
    """Tells of one layer's plans.

    Args:
        layer: Whose.
    """

    def __init__(self, layer: ResidentPlans) -> None:
        self._layer, self._log = layer, DropLog(layer.layer_idx)

    def planned(self, update: ResidentUpdate, report: Sequence[int]) -> None:
        """A plan was due; `report` [REPORT] says whether it was ready here, and how long the device waited.

        The thread that launches may have waited too, before the device could come to it.
        """
        if update.waited_s:
            self._probe.awaited(update.layer, update.waited_s)
        waited = max(0, report[Report.WAITED_NS])
        if waited:
            self._probe.stalled(update.layer, waited / 1e9)
        if report[Report.READY_HERE] == 1 and update.plan and update.staged:
            self._probe.planned(update.layer, update.taken, update.due, update.plan, update.staged.bytes)
        elif not self._log.tells:
            return
        elif update.error is not None:
            _LOG.error("layer %d: the update taken in iteration %d failed: %r", *update.where, update.error)
        else:
            # Which of the two says where to look: at this process, or at what keeps the device's copies from going on.
            lacks = "there is no plan yet" if update.staged is None else "its copies are enqueued, but were not done"
            _LOG.error(
                "layer %d: the update taken in iteration %d is not ready after %.3f s: %s", *update.where, waited / 1e9,
                lacks,
            )  # fmt: skip

    def committed(self, update: ResidentUpdate, iteration: int) -> None:
        """The device has committed it; raises BalancerError E176 where the host knows of no plan."""
        self._log.committed()
        plan, staged = update.plan, update.staged
        if plan is None or staged is None:
            raise BalancerError(
                "E176", f"layer {update.layer}: the device committed a plan that the host does not know",
                why=f"of iteration {update.taken}, due in {iteration}", hint="this is a bug; the run's results stand",
            )  # fmt: skip
        self._layer.device.sink.mark(
            Kind.COMMIT, update.layer, iteration, HOST, a=len(plan.changed), b=plan.placement.digest()
        )
        self._probe.copied(update.layer, staged.by_source)
        self._probe.committed(update.layer, update.taken, plan.placement, plan.changed, staged.bytes)

    def dropped(self, due: int, ready: int, differ: bool, reason: str) -> None:
        """The plan for iteration `due` was given up; `ready` ranks had it, whose digests may `differ`."""
        layer, device = self._layer, self._layer.device
        self._log.dropped(due, device.iteration, reason, ready=ready, ranks=layer.ep_size, differ=differ)
        device.sink.mark(Kind.PLAN_DROPPED, layer.layer_idx, device.iteration, HOST, ready, int(differ))
        self._probe.dropped(layer.layer_idx, due, ready, differ, reason)

    @property
    def _probe(self) -> Probe:
        return self._layer.probe
