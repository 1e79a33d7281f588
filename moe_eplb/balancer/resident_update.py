"""An update of a layer whose state lives on the device: what the updater's thread does for it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from moe_eplb.balancer import agreement
from moe_eplb.balancer.cells import CellView, assign_cells
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.balancer.updater import Update
from moe_eplb.balancer.weight_sources import WeightSource
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.device import Device
from moe_eplb.device.control import LANES, LayerState, ModelState

if TYPE_CHECKING:
    from moe_eplb.balancer.resident_layer import ResidentLayer
    from moe_eplb.balancer.resident_plans import ResidentPlans

__all__ = ["Publisher", "ResidentUpdate"]

_LOG = logging.getLogger(__name__)

_Copy: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Target and source."""


class _Sheet:
    """Host memory from which one plan is copied to the device.

    Attributes:
        copier: What copies from here.
    """

    def __init__(self, device: Device, state: LayerState) -> None:
        self.pending = device.host_visible(tuple(state.pending.shape), torch.int32)
        self.copier = device.new_copier()
        self._pending = self.pending.numpy()

    def write(self, tables: np.ndarray, cells: np.ndarray) -> None:
        """Write a plan down; the device must have the latest one from here."""
        self._pending[: len(tables)], self._pending[len(tables) :] = tables, cells


class _Seen:
    """What the device writes to memory of the host.

    Seen and written through numpy: an operation of torch would hand the interpreter's lock to the thread that launches
    the model, and wait until it comes back.
    """

    def __init__(self, model: ModelState, state: LayerState) -> None:
        self._handed, self._load = state.handed.numpy(), state.handed_load.numpy()
        self._committed = model.committed.numpy()[state.layer : state.layer + 1]

    @property
    def handed(self) -> int:
        """The iteration whose load was handed over last."""
        return int(self._handed[0])

    def load(self) -> np.ndarray:
        """That load as it is now, float64 [E]."""
        found: np.ndarray = self._load.astype(np.float64)
        return found

    @property
    def committed(self) -> int:
        """`due` of the last plan that was committed."""
        return int(self._committed[0])


class Publisher:
    """Prepares the plans of one layer and publishes them to the device. Used by the updater's thread alone.

    A view of the live placement follows what the device says, since only that tells what was committed.
    `due` is the iteration for which it prepares, `seen` what the device tells.

    Args:
        layer: Whose plans.
        tables: Its route tables.
        placement: The initial one.
        source: Where weights come from.
    """

    def __init__(self, layer: ResidentLayer, tables: RouteTables, placement: Placement, source: WeightSource) -> None:
        self._layer, self._tables, self._source = layer, tables, source
        device, state = layer.device, layer.state
        self.due = -1
        first = np.tile(np.arange(placement.slots_per_rank, dtype=np.int32), (len(source.follows), 1))
        self._live = CellView(placement, first)
        self._proposed: CellView | None = None
        # In turns, so that to write the next plan rarely means to wait for the copies of the one before.
        self._sheets = deque(_Sheet(device, state) for _ in range(2))
        model = layer.resident.model
        self.seen = _Seen(model, state)
        # Of one element each, made once: see `_Seen`.
        self._lanes = [state.lanes[at : at + 1] for at in range(LANES)]
        self._overdue, self._ready = model.overdue, model.ready[layer.layer_idx : layer.layer_idx + 1]

    def current(self) -> Placement:
        """The committed placement; the device has finished with the plan before."""
        proposed, self._proposed = self._proposed, None
        if proposed is not None:
            # It is the last that was proposed, so if any was committed since, it is this one.
            self._live = proposed if self.seen.committed == proposed.due else self._live
        return self._live.placement

    def stage(self, plan: Plan) -> StagedWeights:
        """Enqueue copies of this rank's part into free cells, then tables and vote behind them."""
        due, view = self.due, CellView(plan.placement, self._cells_after(plan), self.due)
        cells, mine = view.cells[self._layer.ep_rank - self._source.follows.start], self._mine(plan)
        staged, copies = StagedWeights(), list[_Copy]()
        experts = plan.placement.slot_to_expert[mine]
        for slot, (kind, weights) in zip(self._local(mine), self._source.of(self._live, experts), strict=True):
            before = staged.bytes
            copies += self._layer.cells.write(slot, int(cells[slot]), weights, staged)
            staged.by_source[kind] = staged.by_source.get(kind, 0) + staged.bytes - before
        self._publish(copies, self._tables.of(plan.placement), cells, self._vote(plan, due), due)
        self._proposed = view
        return staged

    def _cells_after(self, plan: Plan) -> np.ndarray:
        follows, slots = self._source.follows, plan.placement.slots_per_rank
        first = follows.start * slots
        changed = plan.changed[(plan.changed >= first) & (plan.changed < follows.stop * slots)] - first
        return assign_cells(
            self._live.cells, changed, len(self._layer.cells.cells), layer=self._layer.layer_idx,
            first_rank=follows.start,
        )  # fmt: skip

    def _mine(self, plan: Plan) -> np.ndarray:
        """The changed slots of this rank."""
        mine = plan.placement.rank_slots(self._layer.ep_rank)
        found: np.ndarray = plan.changed[(plan.changed >= mine.start) & (plan.changed < mine.stop)]
        return found

    def _local(self, slots: np.ndarray) -> list[int]:
        local: list[int] = (slots - self._layer.ep_rank * self._layer.slot_count_per_rank).tolist()
        return local

    def give_up(self, due: int) -> None:
        """Publish that there is no plan, so that the device does not wait for one."""
        self._publish([], None, None, agreement.lane_values(None), due)

    def _vote(self, plan: Plan, due: int) -> Sequence[int]:
        return agreement.lane_values(agreement.plan_digest(self._layer.layer_idx, due, plan.placement.digest()))

    def _publish(
        self, copies: list[_Copy], tables: np.ndarray | None, cells: np.ndarray | None, lanes: Sequence[int], due: int
    ) -> None:
        """Enqueue copies of weights, tables and vote, and last of the word that says that all are there."""
        sheet = self._sheets[0]
        self._sheets.rotate()
        sheet.copier.wait()
        if tables is not None and cells is not None:
            sheet.write(tables, cells)
            copies.append((self._layer.state.pending, sheet.pending))
        vote = zip(self._lanes, lanes, strict=True)
        sheet.copier.enqueue(copies, [*vote, (self._overdue, 0), (self._ready, due)])
        self._layer.resident.bell.tell()


@dataclass(slots=True)
class ResidentUpdate(Update):
    """`Update` whose load the device has yet to hand over when the update is submitted.

    Attributes:
        publisher: The layer's.
        ring: How often the bell will have been rung when the load is there.
        awaited: Whether the device waits for a plan, or may come to: it has handed the load over, or may yet do so.
    """

    publisher: Publisher = field(kw_only=True)
    owner: ResidentPlans = field(kw_only=True)
    ring: int = field(kw_only=True)
    awaited: bool = field(default=False, kw_only=True)

    def begin(self) -> bool:
        """Wait for the load; there is none when the layer's plan before was still under way."""
        resident, seen = self.owner.resident, self.publisher.seen
        if not resident.bell.wait(self.ring, resident.timeout_ns / 1e9):
            self.awaited = True
            raise BalancerError(
                "E173", f"layer {self.layer}: the device did not hand over the load of iteration {self.taken}",
                why=f"the bell was rung {int(resident.bell.word)} times, not {self.ring}",
                hint="the layer's iteration was not run, or the device hangs",
            )  # fmt: skip
        if seen.handed != self.taken:
            return False
        self.awaited = True
        self.publisher.due = self.due
        self.load = seen.load()
        self.current = self.publisher.current()
        if seen.handed != self.taken:  # it was overwritten while it was read: far too late
            raise BalancerError("E173", f"layer {self.layer}: the load of iteration {self.taken} came and went")
        return True

    @property
    def where(self) -> tuple[int, int]:
        """Layer and iteration."""
        return self.layer, self.taken

    def finish(self) -> None:
        """The device is told in any case."""
        if self.staged is None and self.awaited:
            self.give_up()
        else:
            self.done.set()

    def give_up(self) -> None:
        """Let the device not wait for a plan. It waits in vain where that cannot be told, and nothing else is lost."""
        try:
            self.publisher.give_up(self.due)
        except Exception as error:  # noted with the plan: the model goes on with the last good placement
            _LOG.error("layer %d: the device could not be told that there is no plan: %r", self.layer, error)
            self.error = self.error or error
        finally:
            self.done.set()
