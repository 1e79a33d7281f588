"""The balancer of one MoE layer: the ten stage calls that a forward makes around its own work.

Choreography after TensorRT-LLM's online EPLB for Hopper: everything but `route` goes to the balancer stream, ordered
against the caller's stream by reusable events. The wait overlaps the top-k (a `ResidentLayer`'s the experts of the
layer before), statistics and their reduction overlap route, dispatch and experts (those that are held the experts
alone), the hand-over overlaps combine. `OlderChoreography` is what that is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_eplb.balancer.layer_stream import CallRange, LayerStream
from moe_eplb.balancer.layer_weights import LayerWeights
from moe_eplb.balancer.older_choreography import OlderChoreography
from moe_eplb.balancer.statistics import AllReduce, LayerStatistics, require_gathered_shape, require_ids_shape
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.core.placement import Placement, balancedness
from moe_eplb.core.protocol import INITIAL, Call, Illegal, step, violation
from moe_eplb.device import Stream

if TYPE_CHECKING:
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer

__all__ = ["SingleLayerMoeLoadBalancer"]

_KINDS = tuple(Kind(call.value) for call in Call)


class SingleLayerMoeLoadBalancer(LayerWeights):
    """Made by `MoeLoadBalancer.add_layer`.

    Args:
        owner: The model's balancer.
        layer_idx: Position among the balancer's layers, in order of registration.
        expert_count: E.
        top_k: K.
        placement: The initial placement of E experts in P slots.
        aux_stream: Stream for the balancer's work; a new one if None. Static layers have none.
        repeated_count: How often the layer runs in one iteration.
    """

    def __init__(
        self,
        owner: MoeLoadBalancer,
        layer_idx: int,
        expert_count: int,
        top_k: int,
        placement: Placement,
        *,
        aux_stream: Stream | None = None,
        repeated_count: int = 1,
    ) -> None:
        super().__init__(owner, layer_idx, expert_count, top_k, placement)
        self._device = owner.device
        self.repeated_count, self._repeat = repeated_count, 0
        self._state = INITIAL
        self._range = CallRange(self._device.sink)
        if self.updates_enabled:
            options = owner.options
            self._stream: LayerStream | OlderChoreography = (
                OlderChoreography(self._device, layer_idx, aux_stream)
                if options.overlap == "before"
                else LayerStream(self._device, layer_idx, aux_stream)
            )
            self._statistics = LayerStatistics(
                expert_count, decay=options.decay, window=options.window, device=self._device.torch_device
            )
            self.statistic_flag_tensor = self._statistics.flag

    def begin_forward(self) -> tuple[bool, bool]:
        """Whether the forward that begins is the layer's first, and whether its last, in this iteration."""
        repeat, self._repeat = self._repeat, (self._repeat + 1) % self.repeated_count
        return repeat == 0, self._repeat == 0

    def require_statistics(self, path: str) -> None:
        """Raise BalancerError where the layer cannot take this statistics path; here it takes any."""

    # -- the ten stage calls -------------------------------------------------------------------------------------

    def start_wait_gpu_stage(self) -> None:
        """Begin to take the layer's weights and tables; a due plan is committed on the balancer stream."""
        with self._call(Call.START_WAIT_GPU_STAGE):
            if self.updates_enabled:
                self._begin_wait()

    def _begin_wait(self) -> None:
        self._stream.submit(Kind.START_WAIT_GPU_STAGE, self._take_over)
        self._stream.mark()

    def done_wait_gpu_stage(self) -> None:
        """From here on the current stream may read weights and tables."""
        with self._call(Call.DONE_WAIT_GPU_STAGE):
            if self.updates_enabled:
                self._end_wait()

    def _end_wait(self) -> None:
        self._stream.begin_reading()

    def update_local_statistic(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        """Path A: count expert ids int32 [T, K] of this rank."""
        require_ids_shape(ids, self.layer_idx, top_k=self.top_k)
        with self._call(Call.UPDATE_LOCAL_STATISTIC, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit_count(Kind.UPDATE_LOCAL_STATISTIC, ids, is_first_stage, is_last_stage)

    def get_local_statistic_tensor(self) -> Tensor | None:
        """Path A: this rank's counts int32 [E], ready for the current stream; None in static routing."""
        with self._call(Call.GET_LOCAL_STATISTIC_TENSOR):
            if not self.updates_enabled:
                return None
            self._stream.mark()
            self._stream.join()
            return self._statistics.counts()

    def update_statistic_with_gathered_statistic(self, gathered: Tensor) -> None:
        """Path A: the counts of all ranks int32 [R, E]; any other shape is an error."""
        if self.updates_enabled:
            require_gathered_shape(gathered, self.layer_idx, ranks=self.ep_size, experts=self.expert_count)
        with self._call(Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC):
            if self.updates_enabled:
                self._stream.submit(Kind.LOAD_UPDATE, lambda: self._fold_rows(gathered))

    def update_statistic_with_local_ids(
        self, ids: Tensor, is_first_stage: bool, is_last_stage: bool, allreduce: AllReduce | None = None
    ) -> None:
        """Path B: count expert ids int32 [T, K] of this rank; the last stage sums over the ranks with `allreduce`."""
        require_ids_shape(ids, self.layer_idx, top_k=self.top_k)
        if self.updates_enabled and self.ep_size > 1 and allreduce is None:
            raise BalancerError(
                "E139", f"layer {self.layer_idx}: no allreduce for statistics of {self.ep_size} ranks",
                why="a local sum would give every rank another load", hint="pass allreduce=AllReduce(group)",
            )  # fmt: skip
        with self._call(Call.UPDATE_STATISTIC_WITH_LOCAL_IDS, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit_count(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, ids, is_first_stage, is_last_stage)
                if is_last_stage:
                    self._submit_reduction(allreduce)

    # Not calls of the protocol: when the statistics of path B are submitted is left to the layer.

    def hold_statistics(self) -> None:
        """Statistics by local ids may be submitted as late as `release_statistics`, or the hand-over, calls for it.

        Collectives of the model may come in between, so that every rank has to hold them or none. Here nothing is held.
        """

    def mark_statistics(self, *, grouped: bool) -> None:
        """What is held may begin where the current stream is now, in the middle of the experts' work: before it copies
        rows to their cells, or `grouped`, behind that. The layer takes one of the two."""

    def release_statistics(self) -> None:
        """Submit what is held, beside what the current stream does from the mark on, or from now on without one."""

    def update_statistic_with_global_ids(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        """Path C: count the expert ids of all ranks, int32 [sum of T, K]."""
        require_ids_shape(ids, self.layer_idx, top_k=self.top_k)
        with self._call(Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit_count(Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, ids, is_first_stage, is_last_stage)
                if is_last_stage:
                    counts = self._statistics.counts().unsqueeze(0)
                    self._stream.submit(Kind.LOAD_UPDATE, lambda: self._fold_rows(counts))

    def route(self, ids: Tensor, offset_by_ep_rank: bool = False) -> Tensor:
        """Global slot ids int32 [T, K] for expert ids [T, K], on the current stream. Free in static routing.

        A chunk may route on a stream of its own: it too waits for the layer, and the hand-over waits for it.
        """
        require_ids_shape(ids, self.layer_idx, top_k=self.top_k)
        with self._call(Call.ROUTE):
            if self.updates_enabled:
                self._stream.read()
            slots = self._route(partial(self._tables.route, ids, offset=self.ep_rank if offset_by_ep_rank else 0), ids)
        return slots

    def start_set_cpu_stage(self) -> None:
        """Begin to hand the layer over: the experts have been computed, weights are no longer read."""
        with self._call(Call.START_SET_CPU_STAGE):
            if self.updates_enabled:
                self._begin_hand_over()

    def _begin_hand_over(self) -> None:
        self._stream.end_reading()
        self._stream.submit(Kind.START_SET_CPU_STAGE, self._hand_over)
        self._stream.mark()

    def done_set_cpu_stage(self) -> None:
        """The layer's iteration is over; all call counts are zero again."""
        with self._call(Call.DONE_SET_CPU_STAGE):
            if self.updates_enabled:
                self._end_hand_over()

    def _end_hand_over(self) -> None:
        self._stream.join()

    # -- agreement for paths whose sum over ranks the dispatch makes -----------------------------------------------

    def get_agreement_lanes(self) -> Tensor | None:
        """int64 [5] to gather with the statistics of paths A and C; None in static routing and on one rank."""
        if not self.updates_enabled:
            return None
        lanes = self._owner.agreement_lanes(self.layer_idx)
        if self.ep_size > 1:
            return lanes
        self.update_agreement(lanes.unsqueeze(0))
        return None

    def update_agreement(self, gathered: Tensor) -> None:
        """The lanes of all ranks, int64 [R, 5]."""
        self._owner.settle(self.layer_idx, gathered.sum(0))

    def _route(self, choose: Callable[..., Tensor], ids: Tensor, flags: int = 0) -> Tensor:
        return self._device.run(Kind.ROUTE, self.layer_idx, choose, a=flags, b=self.updates.version)

    # -- work on the balancer stream -------------------------------------------------------------------------------

    def abort(self, iteration: int, *, begun: bool) -> None:
        """Forget an iteration that ended in an exception; the next one starts clean, and alike on every rank.

        Counts and plans go, because how much of them the streams had done differs between ranks.
        """
        self.restart()
        if self.updates_enabled:
            if self.updates.abort(iteration, begun=begun):
                self._tables.set(self.placement)
            self._statistics.load.reset()

    @property
    def unfinished(self) -> bool:
        """Whether the layer has begun and not handed over."""
        return self._state is not INITIAL

    def restart(self) -> None:
        """The layer's calls begin anew, after some that came to no end."""
        self._state, self._repeat = INITIAL, 0

    def _call(self, call: Call, first: bool = True, last: bool = True) -> CallRange:
        """Check and record a call; the record ends with the block, also when that raises."""
        flags = first | last << 1 | self.updates_enabled << 2
        token = self._device.sink.begin(_KINDS[call], self.layer_idx, self._device.iteration, HOST, flags)
        try:
            if call is Call.START_WAIT_GPU_STAGE:
                self._owner.enter_layer(self.layer_idx)
            self._state = step(self._state, call, dynamic=self.updates_enabled, first=first, last=last)
        except Illegal as error:
            self._device.sink.end(token)
            raise violation(self.layer_idx, self._device.iteration, error) from None
        self._range.token = token
        return self._range

    def _take_over(self) -> None:
        self._statistics.flag.fill_(int(self._owner.counts_now))
        if self.updates.commit_due(self._device.iteration):
            self._tables.set(self.placement)

    def _submit_count(self, kind: Kind, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        self._stream.submit(kind, lambda: self._statistics.count(ids, is_first_stage))

    def _submit_reduction(self, allreduce: AllReduce | None) -> None:
        message: list[Tensor] = []

        def reduce() -> None:
            lanes = self._owner.agreement_lanes(self.layer_idx)
            message.append(torch.cat([self._statistics.counts().to(torch.int64), lanes]))
            if allreduce is not None:
                allreduce(message[0])
            self._owner.settle(self.layer_idx, message[0][self.expert_count :])

        def fold() -> None:
            self._fold(message[0][: self.expert_count])

        self._stream.submit_next(Kind.STATISTIC_REDUCE, reduce, collective=True)
        self._stream.submit_next(Kind.LOAD_UPDATE, fold)

    def _fold_rows(self, counts: Tensor) -> None:
        """Fold the sum of rows int [N, E] into the load."""
        self._fold(counts.to(torch.int64).sum(0))

    def _fold(self, counts: Tensor) -> None:
        """Fold reduced counts int64 [E] into the load."""
        if not self._statistics.flag.item():
            return
        counts = counts.cpu()
        self._statistics.load.fold(counts)
        reduced = counts.numpy()
        balance = float(balancedness(self.placement.rank_load(reduced)))
        self._owner.probe.reduced(self.layer_idx, reduced, balance)

    def _hand_over(self) -> None:
        if self._owner.takes_update(self.layer_idx):
            self.updates.take(self._device.iteration, self._statistics.load)
