"""The balancer of one MoE layer: the ten stage calls that a forward makes around its own work.

Choreography after TensorRT-LLM's online EPLB for Hopper: everything but `route` goes to the balancer stream, ordered
against the caller's stream by two reusable events. The wait overlaps the top-k, statistics and their reduction overlap
route, dispatch and experts, the hand-over overlaps combine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_eplb.balancer.layer_update import LayerUpdate
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.balancer.statistics import AllReduce, LoadWindow, accumulate
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, EventSink, Kind
from moe_eplb.core.placement import Placement, balancedness
from moe_eplb.core.protocol import INITIAL, Call, Illegal, step, violation
from moe_eplb.device import AuxStreamType, EventType, Stream

if TYPE_CHECKING:
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer

__all__ = ["SingleLayerMoeLoadBalancer"]

_KINDS = tuple(Kind(call.value) for call in Call)


class _Range:
    """An open record of a call."""

    __slots__ = ("_sink", "_token")

    def __init__(self, sink: EventSink, token: int) -> None:
        self._sink, self._token = sink, token

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._sink.end(self._token)


class SingleLayerMoeLoadBalancer:
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
        self._owner, self._device = owner, owner.device
        self.layer_idx, self.expert_count, self.top_k = layer_idx, expert_count, top_k
        self.ep_rank, self.ep_size = owner.ep_rank, owner.ep_size
        self.slot_count_per_rank = placement.slots_per_rank
        self.repeated_count = repeated_count
        self.updates_enabled = owner.is_dynamic_routing()
        self.updates = LayerUpdate(owner, self, placement)
        self._tables = RouteTables(placement, rank=self.ep_rank, choice=owner.options.replica_choice)
        self._state = INITIAL
        self._readers: list[Stream] = []
        self._local: Tensor | None = None
        if self.updates_enabled:
            self._make_dynamic(aux_stream)

    def _make_dynamic(self, aux_stream: Stream | None) -> None:
        options = self._owner.options
        self._aux = aux_stream or self._device.stream(AuxStreamType.MoeBalancer)
        names = (EventType.Main, EventType.MoeBalancer)
        self._events = {name: self._device.new_event(name.name) for name in names}
        self._load = LoadWindow(self.expert_count, decay=options.decay, window=options.window)
        self.statistic_flag_tensor = torch.zeros(1, dtype=torch.int32)

    # -- what the model asks -------------------------------------------------------------------------------------

    def is_static_routing(self) -> bool:
        """Whether the placement never changes."""
        return not self.updates_enabled

    def is_dynamic_routing(self) -> bool:
        """Whether experts may move while the model runs."""
        return self.updates_enabled

    def need_load_shared_weights(self) -> bool:
        """Whether the model must give the host copies of `load_expert_ids`."""
        return self.updates_enabled

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        return self.updates.placement

    @property
    def load_expert_ids(self) -> range:
        """Experts whose host copy this rank gives (dynamic routing)."""
        return self.updates.host.experts_of(self.ep_rank)

    def local_slot_experts(self) -> list[int]:
        """The expert in each of this rank's slots."""
        return [int(e) for e in self.placement.slot_to_expert[self.placement.rank_slots(self.ep_rank)]]

    def set_initial_weight_assignments(self, experts: list[int]) -> None:
        """Set the expert of each of the P slots, before weights are loaded."""
        placement = Placement(self.ep_size, self.expert_count, torch.tensor(experts, dtype=torch.int32).numpy())
        if placement.slots_per_rank != self.slot_count_per_rank:
            raise BalancerError(
                "E131", f"layer {self.layer_idx}: the initial placement has {placement.slots} slots",
                why=f"the layer has {self.slot_count_per_rank} on each of {self.ep_size} ranks",
                hint="give the expert of every slot of every rank",
            )  # fmt: skip
        self.updates.placement = placement
        self._tables.set(placement)

    def register_weight_slot(self, local_slot: int, name: str, tensor: Tensor) -> None:
        """Tell which tensor the kernel reads as weight `name` of a local slot."""
        self.updates.slots.register(local_slot, name, tensor)

    def share_expert_weight(self, expert: int, name: str, tensor: Tensor) -> None:
        """Give the host copy of one weight of one expert of `load_expert_ids`."""
        self.updates.host.share_host_tensor(expert, name, tensor)

    # -- the ten stage calls -------------------------------------------------------------------------------------

    def start_wait_gpu_stage(self) -> None:
        """Begin to take the layer's weights and tables; a due plan is committed on the balancer stream."""
        with self._call(Call.START_WAIT_GPU_STAGE):
            if self.updates_enabled:
                self._submit(Kind.START_WAIT_GPU_STAGE, self._take_over)
                self._device.record(self._events[EventType.MoeBalancer], self._aux)

    def done_wait_gpu_stage(self) -> None:
        """From here on the current stream may read weights and tables."""
        with self._call(Call.DONE_WAIT_GPU_STAGE):
            self._join()
            self._readers = [self._device.current]

    def update_local_statistic(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        """Path A: count expert ids int32 [T, K] of this rank."""
        with self._call(Call.UPDATE_LOCAL_STATISTIC, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit(Kind.UPDATE_LOCAL_STATISTIC, lambda: self._count(ids, is_first_stage))

    def get_local_statistic_tensor(self) -> Tensor | None:
        """Path A: this rank's counts int32 [E], ready for the current stream; None in static routing."""
        with self._call(Call.GET_LOCAL_STATISTIC_TENSOR):
            if self.updates_enabled:
                self._device.record(self._events[EventType.MoeBalancer], self._aux)
                self._join()
        return self._local if self.updates_enabled else None

    def update_statistic_with_gathered_statistic(self, gathered: Tensor) -> None:
        """Path A: the counts of all ranks int32 [R, E]; any other shape is an error."""
        self._require_gathered_shape(gathered)
        with self._call(Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC):
            if self.updates_enabled:
                self._submit(Kind.LOAD_UPDATE, lambda: self._fold(gathered.to(torch.int64).sum(0)))

    def update_statistic_with_local_ids(
        self, ids: Tensor, is_first_stage: bool, is_last_stage: bool, allreduce: AllReduce | None = None
    ) -> None:
        """Path B: count expert ids int32 [T, K] of this rank; the last stage sums over the ranks with `allreduce`."""
        if self.updates_enabled and self.ep_size > 1 and allreduce is None:
            raise BalancerError(
                "E139", f"layer {self.layer_idx}: no allreduce for statistics of {self.ep_size} ranks",
                why="a local sum would give every rank another load", hint="pass allreduce=AllReduce(group)",
            )  # fmt: skip
        with self._call(Call.UPDATE_STATISTIC_WITH_LOCAL_IDS, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, lambda: self._count(ids, is_first_stage))
                if is_last_stage:
                    self._submit_reduction(allreduce)

    def update_statistic_with_global_ids(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        """Path C: count the expert ids of all ranks, int32 [sum of T, K]."""
        with self._call(Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS, is_first_stage, is_last_stage):
            if self.updates_enabled:
                self._submit(Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, lambda: self._count(ids, is_first_stage))
                if is_last_stage:
                    self._submit(Kind.LOAD_UPDATE, lambda: self._fold(self._counts().to(torch.int64)))

    def route(self, ids: Tensor, offset_by_ep_rank: bool = False) -> Tensor:
        """Global slot ids int32 [T, K] for expert ids [T, K], on the current stream. Free in static routing.

        A chunk may route on a stream of its own: it too waits for the layer, and the hand-over waits for it.
        """
        with self._call(Call.ROUTE):
            if self.updates_enabled and self._device.current not in self._readers:
                self._join()
                self._readers.append(self._device.current)
            offset = self.ep_rank if offset_by_ep_rank else 0
            choose = partial(self._tables.route, ids, offset=offset)
            slots = self._device.run(Kind.ROUTE, self.layer_idx, choose, b=self.updates.version)
        return slots

    def start_set_cpu_stage(self) -> None:
        """Begin to hand the layer over: the experts have been computed, weights are no longer read."""
        with self._call(Call.START_SET_CPU_STAGE):
            if self.updates_enabled:
                for stream in self._readers:
                    self._follow(stream)
                self._submit(Kind.START_SET_CPU_STAGE, self._hand_over)
                self._device.record(self._events[EventType.MoeBalancer], self._aux)

    def done_set_cpu_stage(self) -> None:
        """The layer's iteration is over; all call counts are zero again."""
        with self._call(Call.DONE_SET_CPU_STAGE):
            self._join()

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

    # -- work on the balancer stream -------------------------------------------------------------------------------

    def abort(self, iteration: int, *, begun: bool) -> None:
        """Forget an iteration that ended in an exception; the next one starts clean, and alike on every rank.

        Counts and plans go, because how much of them the streams had done differs between ranks.
        """
        self._state = INITIAL
        if self.updates_enabled:
            if self.updates.abort(iteration, begun=begun):
                self._tables.set(self.placement)
            self._load.reset()

    @property
    def unfinished(self) -> bool:
        """Whether the layer has begun and not handed over."""
        return self._state is not INITIAL

    def _call(self, call: Call, first: bool = True, last: bool = True) -> _Range:
        """Check and record a call; the record ends with the block, also when that raises."""
        return _Range(self._device.sink, self._enter(call, first, last))

    def _enter(self, call: Call, first: bool = True, last: bool = True) -> int:
        flags = first | last << 1 | self.updates_enabled << 2
        token = self._device.sink.begin(_KINDS[call], self.layer_idx, self._device.iteration, HOST, flags)
        try:
            if call is Call.START_WAIT_GPU_STAGE:
                self._owner.enter_layer(self.layer_idx)
            self._state = step(self._state, call, dynamic=self.updates_enabled, first=first, last=last)
        except Illegal as error:
            self._device.sink.end(token)
            raise violation(self.layer_idx, self._device.iteration, error) from None
        return token

    def _submit(self, kind: Kind, work: Callable[[], None]) -> None:
        """Put work on the balancer stream, after what the current stream has submitted so far."""
        self._follow(self._device.current)
        self._device.submit(self._aux, kind, self.layer_idx, work)

    def _follow(self, stream: Stream) -> None:
        """Later work on the balancer stream runs after what `stream` has submitted so far."""
        main = self._events[EventType.Main]
        self._device.record(main, stream)
        self._device.wait(self._aux, main)

    def _join(self) -> None:
        if self.updates_enabled:
            self._device.wait(self._device.current, self._events[EventType.MoeBalancer])

    def _take_over(self) -> None:
        self.statistic_flag_tensor.fill_(int(self._owner.counts_now))
        if self.updates.commit_due(self._device.iteration):
            self._tables.set(self.placement)

    def _counts(self) -> Tensor:
        if self._local is None:
            with torch.inference_mode(False):  # whatever mode comes first, later iterations of any mode write to it
                self._local = torch.zeros(self.expert_count, dtype=torch.int32)
        return self._local

    def _count(self, ids: Tensor, is_first_stage: bool) -> None:
        counts = self._counts()
        if is_first_stage:
            counts.zero_()
        if self.statistic_flag_tensor.item():
            accumulate(ids, counts)

    def _submit_reduction(self, allreduce: AllReduce | None) -> None:
        message: list[Tensor] = []

        def reduce() -> None:
            lanes = self._owner.agreement_lanes(self.layer_idx)
            message.append(torch.cat([self._counts().to(torch.int64), lanes]))
            if allreduce is not None:
                allreduce(message[0])
            self._owner.settle(self.layer_idx, message[0][self.expert_count :])

        def fold() -> None:
            self._fold(message[0][: self.expert_count])

        self._device.submit(self._aux, Kind.STATISTIC_REDUCE, self.layer_idx, reduce, collective=True)
        self._device.submit(self._aux, Kind.LOAD_UPDATE, self.layer_idx, fold)

    def _fold(self, counts: Tensor) -> None:
        """Fold reduced counts int64 [E] into the load."""
        if not self.statistic_flag_tensor.item():
            return
        self._load.fold(counts)
        reduced = counts.numpy()
        balance = float(balancedness(self.placement.rank_load(reduced)))
        self._owner.probe.reduced(self.layer_idx, reduced, balance)

    def _hand_over(self) -> None:
        if self._owner.takes_update(self.layer_idx):
            self.updates.take(self._device.iteration, self._load)

    def _require_gathered_shape(self, gathered: Tensor) -> None:
        expected = (self.ep_size, self.expert_count)
        if self.updates_enabled and tuple(gathered.shape) != expected:
            raise BalancerError(
                "E141", f"layer {self.layer_idx}: gathered statistics have the wrong shape",
                why=f"{tuple(gathered.shape)}, expected (ep_size, num_experts) = {expected}",
                hint="gather every rank's get_local_statistic_tensor() along a new first dimension",
            )  # fmt: skip
