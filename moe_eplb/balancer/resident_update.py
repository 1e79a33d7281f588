"""An update of a layer whose state lives on the device: what the updater's thread does for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_eplb.balancer import agreement
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.balancer.updater import Update
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan

if TYPE_CHECKING:
    from moe_eplb.balancer.resident_layer import ResidentLayer

__all__ = ["Publisher", "ResidentUpdate"]


@dataclass(slots=True)
class _View:
    """Where experts and cells are, as the updater's thread knows it."""

    placement: Placement
    cells: np.ndarray
    due: int = -1


class Publisher:
    """Prepares the plans of one layer and publishes them to the device. Used by the updater's thread alone.

    A view of the live placement follows what the device says, since only that tells what was committed.
    `due` is the iteration for which it prepares.
    """

    def __init__(self, layer: ResidentLayer, tables: RouteTables, placement: Placement) -> None:
        self._layer, self._tables = layer, tables
        device, state = layer.device, layer.state
        self.due = -1
        self._live = _View(placement, state.cells.cpu().numpy().copy())
        self._proposed: _View | None = None
        self._pending = device.host_visible(tuple(state.pending.shape), torch.int32)
        self._lanes = device.host_visible(tuple(state.lanes.shape), torch.int64)
        self._ready = device.host_visible((1,), torch.int64)
        self._zero = device.host_visible((1,), torch.int64)
        self._copied = device.copied()

    def current(self) -> Placement:
        """The committed placement; the device has finished with the plan before."""
        proposed, self._proposed = self._proposed, None
        if proposed is not None:
            # It is the last that was proposed, so if any was committed since, it is this one.
            committed = int(self._layer.resident.model.committed[self._layer.layer_idx])
            self._live = proposed if committed == proposed.due else self._live
        return self._live.placement

    def stage(self, plan: Plan) -> StagedWeights:
        """Enqueue copies of this rank's part into free cells, then tables and vote behind them."""
        layer, due, mine = self._layer, self.due, plan.placement.rank_slots(self._layer.ep_rank)
        slots = [int(slot) - mine.start for slot in plan.changed if mine.start <= slot < mine.stop]
        cells = layer.cells.choose(self._live.cells, slots)
        staged = StagedWeights()
        with layer.device.copying():
            for slot in slots:
                expert = int(plan.placement.slot_to_expert[mine.start + slot])
                layer.cells.write(slot, int(cells[slot]), expert, layer.updates.host, staged)
            self._publish(self._tables.of(plan.placement), cells, self._vote(plan, due), due)
        self._proposed = _View(plan.placement, cells, due)
        return staged

    def give_up(self, due: int) -> None:
        """Publish that there is no plan, so that the device does not wait for one."""
        with self._layer.device.copying():
            self._publish(None, None, torch.zeros_like(self._lanes), due)

    def _vote(self, plan: Plan, due: int) -> torch.Tensor:
        return agreement.lanes(agreement.plan_digest(self._layer.layer_idx, due, plan.placement.digest()))

    def _publish(self, tables: np.ndarray | None, cells: np.ndarray | None, lanes: torch.Tensor, due: int) -> None:
        layer, model, state = self._layer, self._layer.resident.model, self._layer.state
        self._copied()  # of the plan before, whose host memory is written anew
        if tables is not None and cells is not None:
            self._pending.copy_(torch.from_numpy(np.concatenate((tables, cells)).astype(np.int32)))
            state.pending.copy_(self._pending, non_blocking=True)
        self._lanes.copy_(lanes)
        self._ready.fill_(due)
        state.lanes.copy_(self._lanes, non_blocking=True)
        model.overdue.copy_(self._zero, non_blocking=True)
        at = layer.layer_idx
        model.ready[at : at + 1].copy_(self._ready, non_blocking=True)
        self._copied = layer.device.copied()
        layer.resident.bell.tell()


@dataclass(slots=True)
class ResidentUpdate(Update):
    """`Update` whose load the device has yet to hand over when the update is submitted.

    Attributes:
        publisher: The layer's.
        ring: How often the bell will have been rung when the load is there.
        taken_up: Whether the device did hand a load over.
    """

    publisher: Publisher = field(kw_only=True)
    owner: ResidentLayer = field(kw_only=True)
    ring: int = field(kw_only=True)
    taken_up: bool = field(default=False, kw_only=True)

    def begin(self) -> bool:
        """Wait for the load; there is none when the layer's plan before was still under way."""
        resident, state = self.owner.resident, self.owner.state
        if not resident.bell.wait(self.ring, resident.timeout_ns / 1e9):
            raise BalancerError(
                "E173", f"layer {self.layer}: the device did not hand over the load of iteration {self.taken}",
                why=f"the bell was rung {int(resident.bell.word)} times, not {self.ring}, within "
                f"{resident.timeout_ns / 1e9:g} s",
                hint="the layer's iteration was not run, or the device hangs",
            )  # fmt: skip
        if int(state.handed) != self.taken:
            return False
        self.taken_up = True
        self.publisher.due = self.due
        self.load = state.handed_load.numpy().astype(np.float64)
        self.current = self.publisher.current()
        if int(state.handed) != self.taken:  # it was overwritten while it was read: far too late
            raise BalancerError("E173", f"layer {self.layer}: the load of iteration {self.taken} came and went")
        return True

    @property
    def where(self) -> tuple[int, int]:
        """Layer and iteration."""
        return self.layer, self.taken

    def finish(self) -> None:
        """The device is told in any case."""
        try:
            if self.taken_up and self.staged is None:
                self.publisher.give_up(self.due)
        finally:
            self.done.set()
