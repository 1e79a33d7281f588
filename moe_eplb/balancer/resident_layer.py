"""One layer's balancer with its state on the device: the same ten calls, none of which waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from moe_eplb.balancer.cells import CellWeights, require_in_order
from moe_eplb.balancer.plan_notes import PlanNotes
from moe_eplb.balancer.resident import Resident
from moe_eplb.balancer.resident_stages import ResidentStages
from moe_eplb.balancer.resident_update import Publisher
from moe_eplb.balancer.statistics import AllReduce
from moe_eplb.balancer.weight_sources import WeightSource
from moe_eplb.core.events import ROUTE_COUNTS, VOTES, Kind
from moe_eplb.core.placement import balancedness
from moe_eplb.device import control, ops
from moe_eplb.device.control import LayerState

__all__ = ["ResidentLayer"]

_FEW = 4096
"""So many expert ids are counted where they are routed: a kernel beside costs such short ones more than it hides.

One rank goes on at once, beside the grouping. What several hold of so few begins with the first product, which is busy
with weights; of more with the copying of rows, since there a product needs every processor from its begin on.
"""


@dataclass(slots=True)
class _LateCount:
    """Expert ids that will be counted when they are routed, and the reduction that is to follow."""

    ids: Tensor
    reduce: Callable[[], None] | None = None


class ResidentLayer(ResidentStages):
    """See `SingleLayerMoeLoadBalancer`, which is its slow twin; made by `MoeLoadBalancer.add_layer`.

    Attributes:
        cells: Its weights; there from `register_weight_cells` on.
    """

    cells: CellWeights
    _late: _LateCount | None = None
    _held: list[Callable[[], None]] | None = None
    _few = True
    _following: ResidentLayer

    # -- set-up ----------------------------------------------------------------------------------------------------

    @property
    def spare_slots(self) -> int:
        """How many slots of this rank a plan can change at once."""
        spare = self._owner.options.spare_slots
        return self.slot_count_per_rank if spare is None else spare

    def register_weight_cells(self, table: Tensor, cells: Sequence[Mapping[str, Tensor]]) -> None:
        """Tell the cells of this rank: their tensors, and the int32 [S] that says which are live."""
        self.cells = CellWeights(table, cells)

    def require_cells(self) -> CellWeights:
        """What the model has told of its cells; raises BalancerError E137 unless it has, with slot s in cell s."""
        return require_in_order(getattr(self, "cells", None), self.slot_count_per_rank, self.layer_idx)

    def finish_setup(self, resident: Resident, following: ResidentLayer, source: WeightSource) -> None:
        """All layers are there and weights are loaded; `following` runs next, weights that move come from `source`."""
        self.resident, self._following, self._flying = resident, following, {}
        self.state = self._new_state()
        self.statistic_flag_tensor = resident.model.turn[1:2]
        self._statistics.use(self.state.counts)
        self._publisher = Publisher(self, self._tables, self.placement, source)
        self._notes = PlanNotes(self)

    def _new_state(self) -> LayerState:
        return LayerState.make(
            self.layer_idx, self.expert_count, self._tables.block, self.cells.table, self._owner.options.window,
            self._device.host_visible,
        )  # fmt: skip

    # -- work on the balancer stream -------------------------------------------------------------------------------

    def get_agreement_lanes(self) -> Tensor | None:
        """int64 [5] to gather with the statistics of paths A and C; None in static routing and on one rank."""
        if not self.updates_enabled:
            return None
        self._stream.submit(Kind.VOTE, self._vote)
        lanes = self.state.message[self.expert_count :]
        if self.ep_size == 1:
            self._stream.submit_next(Kind.SETTLE_VOTE, lambda: self._settle(lanes.unsqueeze(0)))
            return None
        self._stream.mark()
        self._stream.join()
        return lanes

    def update_agreement(self, gathered: Tensor) -> None:
        """The lanes of all ranks, int64 [R, 5]."""
        self._stream.submit(Kind.SETTLE_VOTE, lambda: self._settle(gathered))

    def hold_statistics(self) -> None:
        """See the base class."""
        if self._our_stream is not None and self._held is None:
            self._held = []

    def mark_statistics(self, *, grouped: bool) -> None:
        """See the base class."""
        stream, beside_products = self._our_stream, self._few and self.ep_size > 1
        if stream is not None and self._held and grouped == beside_products:
            stream.mark_within()

    def release_statistics(self) -> None:
        """See the base class."""
        self._count_late()
        stream, held, self._held = self._our_stream, self._held, None
        if stream is not None and held:
            stream.follow_mark()
            for submit in held:
                submit()

    def start_set_cpu_stage(self) -> None:
        """See the base class."""
        self.release_statistics()
        super().start_set_cpu_stage()

    def _submit_count(self, kind: Kind, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        local = kind is Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS
        count = partial(ops.histogram, ids, self.state.counts)
        self._few = ids.numel() <= _FEW
        # Chunks route on streams of their own, of which none may write what another writes, too.
        if local and self._our_stream is not None and is_first_stage and is_last_stage and self._few:
            self._late = _LateCount(ids)
        elif local and self._held is not None:
            self._held.append(partial(self._stream.submit_next, kind, count))
        else:
            self._stream.submit(kind, count)

    def _submit_reduction(self, allreduce: AllReduce | None) -> None:
        reduce = partial(self._reduce, allreduce)
        if self._late is not None and (self._held is None or self.ep_size == 1):
            self._late.reduce = reduce
        elif self._held is not None:
            self._held.append(reduce)
        else:
            reduce()

    def _route(self, choose: Callable[..., Tensor], ids: Tensor, flags: int = 0) -> Tensor:
        late, stream = self._late, self._our_stream
        if late is None or late.ids is not ids or stream is None:
            return super()._route(choose, ids, flags)
        self._late = None
        slots = super()._route(partial(choose, counts=self.state.counts), ids, flags | ROUTE_COUNTS)
        if late.reduce is not None:
            stream.follow()
            late.reduce()
        return slots

    def _count_late(self) -> None:
        """Count ids that were not routed after all."""
        late, self._late = self._late, None
        if late is not None:
            count = partial(ops.histogram, late.ids, self.state.counts)
            self._stream.submit(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, count)
            if late.reduce is not None:
                late.reduce()

    def _reduce(self, allreduce: AllReduce | None) -> None:
        if allreduce is None:
            self._stream.submit_next(Kind.LOAD_UPDATE, self._vote_and_fold, a=self._carries | VOTES)
            return
        self._stream.submit_next(Kind.VOTE, self._vote, a=self._carries)
        self._stream.submit_next(Kind.STATISTIC_REDUCE, partial(allreduce, self._message), collective=True)
        self._stream.submit_next(Kind.LOAD_UPDATE, self._settle_and_fold, a=self._carries)

    @property
    def _carries(self) -> int:
        """Payload of the records of its votes and load updates."""
        return 0

    @property
    def _message(self) -> Tensor:
        """What its sum over the ranks sums."""
        return self.state.message

    def _settle_and_fold(self) -> None:
        control.settle_and_fold(
            self.resident.model, self.state, self._following.state, self.state.message,
            ranks=self.ep_size, decay=self._owner.options.decay,
        )  # fmt: skip
        self._folded()

    def _vote(self) -> None:
        resident = self.resident
        self._await_following()
        control.vote(
            resident.model, self.state, self._following.state, timeout_ns=resident.timeout_ns, wait=resident.wait
        )

    def _vote_and_fold(self) -> None:
        """Of one rank, which sums with nobody."""
        resident = self.resident
        self._await_following()
        control.vote_and_fold(
            resident.model, self.state, self._following.state, timeout_ns=resident.timeout_ns, wait=resident.wait,
            decay=self._owner.options.decay,
        )  # fmt: skip
        self._folded()

    def _await_following(self) -> None:
        if not self._device.immediate and not self._device.capturing:
            self._following.await_plan(self._device.iteration)

    def _settle(self, lanes: Tensor) -> None:
        control.settle(self.resident.model, self._following.state, lanes, ranks=self.ep_size)

    def _fold_rows(self, counts: Tensor) -> None:
        control.fold(self.resident.model, self.state, counts, decay=self._owner.options.decay)
        self._folded()

    def _folded(self) -> None:
        if self._device.immediate and self._owner.counts_now:
            self.report_counts()
        if self.resident.looks_ahead and self._is_last:
            control.look_ahead(self.resident.model)

    def _hand_over(self) -> None:
        control.hand_over(self.resident.model, self.state, delay=self._owner.options.commit_delay)
        self._handed_over([self.layer_idx])

    def _handed_over(self, layers: Iterable[int]) -> None:
        """The hand-over of some layers is enqueued, in this order."""
        self.resident.bell.tell()
        if not self._device.capturing:
            for layer in layers:
                self._owner.expect(layer)

    def restart(self) -> None:
        """See the base class."""
        super().restart()
        self._late = self._held = None
        if self._our_stream is not None:
            self._our_stream.forget_mark()

    def report_counts(self) -> None:
        """Show the probe what was folded in; waits for the device where that works later."""
        counts = self.state.reduced.cpu().numpy().copy()
        balance = float(balancedness(self.placement.rank_load(counts)))
        self.probe.reduced(self.layer_idx, counts, balance)

    def abort(self, iteration: int, *, begun: bool) -> None:
        """See the base class; the device has stopped.

        Where the layer before may have taken this one over, the ranks need not have failed on the same side of that.
        """
        if begun or not self._device.immediate:
            control.take_over(self.resident.model, self.state)  # where that has run already, nothing is due any more
            self._device.synchronize()
            self.collect(iteration)
        self.give_all_up(iteration)
        self.restart()
        self.state.forget()
