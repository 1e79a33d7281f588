"""The online expert-parallel load balancer of a model.

Public names and their meaning follow TensorRT-LLM's ``moe_load_balancer.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.balancer import agreement
from moe_eplb.balancer.build_context import BuildContext
from moe_eplb.balancer.host_memory import clean_segments, new_instance
from moe_eplb.balancer.layer_update import LayerUpdate
from moe_eplb.balancer.options import BalancerOptions
from moe_eplb.balancer.peers import PeerCells
from moe_eplb.balancer.resident import Resident
from moe_eplb.balancer.resident_calls import ResidentCalls
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.balancer.single_layer import SingleLayerMoeLoadBalancer
from moe_eplb.balancer.updater import Updater
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots
from moe_eplb.core.probe import NullProbe, Probe
from moe_eplb.core.protocol import Illegal, IterCall, IterState, iter_step, violation
from moe_eplb.core.schedule import UpdateSchedule
from moe_eplb.device import Device, Stream, get_device

__all__ = ["MoeLoadBalancer"]


class MoeLoadBalancer(ResidentCalls, BuildContext):
    """Counts, replicates and moves experts of all MoE layers of a model while it runs.

    A context manager: models built inside the block find it through `get_moe_load_balancer`. Tearing down is explicit
    and collective: call `shutdown` on every rank.

    Args:
        ep_rank, ep_size: This rank among the R ranks that share the experts.
        layer_updates_per_iter: How many layers get a new placement in an iteration; 0 is static routing.
        shared_memory_base_name: Name part of the shared host copies; by default one that nobody else has.
        device: Where the model runs; the CPU reference by default.
        group: Process group of the R ranks for set-up exchanges, apart from the model's; needed for R > 1.
        options: See `BalancerOptions`.
        probe: Watches what the balancer does.
    """

    def __init__(
        self,
        ep_rank: int,
        ep_size: int,
        layer_updates_per_iter: int,
        shared_memory_base_name: str | None = None,
        *,
        device: Device | None = None,
        group: dist.ProcessGroup | None = None,
        options: BalancerOptions | None = None,
        probe: Probe | None = None,
    ) -> None:
        if ep_size > 1 and group is None and layer_updates_per_iter:
            raise BalancerError(
                "E142", "no process group for the balancer", why=f"{ep_size} ranks exchange statistics and host memory",
                hint="pass group=torch.distributed.new_group(ranks)",
            )  # fmt: skip
        self.ep_rank, self.ep_size = ep_rank, ep_size
        self.layer_updates_per_iter = layer_updates_per_iter
        self.device = device or get_device("cpu", NullSink())
        self.group = group
        self.options = options or BalancerOptions()
        self.probe: Probe = probe or NullProbe()
        if ep_rank == 0 and self.is_dynamic_routing():
            clean_segments()  # what a crash left may be in the way of the host copies
        self.instance = shared_memory_base_name or self._agree_on_instance()
        self.layers: list[SingleLayerMoeLoadBalancer] = []
        self.enable_statistic = False
        self.enable_update_weights = False
        self.updater = Updater(
            self.device.sink, timeout_s=self.options.update_timeout_s,
            # Beside a GPU the thread that launches must not wait for the one that plans.
            planning=self.options.planning(compiled=self.device.kind == "cuda"), enter=self.device.enter_thread,
        )  # fmt: skip
        self._iter = IterState(next_iteration=0, in_iter=False)
        self._schedule: UpdateSchedule | None = None
        self.counts_now = False
        self._resident: Resident | None = None
        self._resident_layers: list[ResidentLayer] = []
        self._peers: PeerCells | None = None
        self._unpin: list[Callable[[], None]] = []
        self._group_now: tuple[int, ...] = ()
        self._repeated_for_next_layer = 1
        BuildContext.__init__(self)

    # -- building the model ----------------------------------------------------------------------------------------

    def is_static_routing(self) -> bool:
        """Whether placements never change."""
        return self.layer_updates_per_iter == 0

    def set_repeated_for_next_layer(self, count: int) -> None:
        """The next layer that is added runs `count` times an iteration (a shared layer such as MTP)."""
        if count < 1:
            raise BalancerError("E143", "a layer runs at least once an iteration", why=f"repeated count {count}")
        self._repeated_for_next_layer = count

    def add_layer(
        self, expert_count: int, top_k: int, slot_count_per_rank: int, aux_stream: Stream | None = None
    ) -> SingleLayerMoeLoadBalancer:
        """Register the next MoE layer; layers run in the order in which they are added."""
        if self._schedule is not None:
            raise BalancerError("E144", "a layer was added after finalize_model", hint="build the whole model first")
        slots = initial_slots(expert_count, self.ep_size, slot_count_per_rank)
        layer = self._layer_type()(
            self, len(self.layers), expert_count, top_k, Placement(self.ep_size, expert_count, slots),
            aux_stream=aux_stream, repeated_count=self._repeated_for_next_layer,
        )  # fmt: skip
        self._repeated_for_next_layer = 1
        self.layers.append(layer)
        return layer

    def finalize_model(self) -> None:
        """Share the host copies, check what was registered and start the updater (dynamic routing)."""
        if self._schedule is not None:
            raise BalancerError("E144", "the model is already finalized", hint="call finalize_model() once")
        if self.is_dynamic_routing():
            if not self.layers:
                raise BalancerError(
                    "E147", "no MoE layer has joined the balancer", why="updates would silently do nothing",
                    hint="build the model inside `with balancer:`",
                )  # fmt: skip
            if len(self.layers) == 1 and self.options.commit_delay < 2:
                raise BalancerError(
                    "E145", "one layer cannot commit in the iteration after its hand-over",
                    why="its plan is agreed on in a later sum of statistics, and there is no other layer to carry it",
                    hint="use commit_delay=2 or more",
                )  # fmt: skip
            for layer in self.layers:
                layer.finish_weights()
            if self.is_resident:
                self._make_resident()
            self.updater.start()
        self._schedule = UpdateSchedule(
            len(self.layers), self.layer_updates_per_iter, empty_group=self.options.empty_group
        )

    # -- iterations --------------------------------------------------------------------------------------------------

    def set_warm_up_iter_count(self, count: int) -> None:
        """The next `count` iterations count tokens but move nothing."""
        self._finalized().warm_up_until = self.iter_id - 1 + self._iter.in_iter + count

    def set_iter_info(self, enable_statistic: bool | None = None, enable_update_weights: bool | None = None) -> None:
        """Switch statistics and updates for the coming iterations; None keeps."""
        statistic = self.enable_statistic if enable_statistic is None else enable_statistic
        update = self.enable_update_weights if enable_update_weights is None else enable_update_weights
        if update and not statistic:
            raise BalancerError(
                "E146", "updates without statistics", why="a placement would be made from loads that nobody counts",
                hint="enable statistics too, or switch updates off",
            )  # fmt: skip
        self.enable_statistic, self.enable_update_weights = statistic, update

    def start_iter(self) -> None:
        """Begin an iteration: one for each real execution of the model."""
        schedule = self._finalized()
        flags = self.enable_statistic | self.enable_update_weights << 1
        self.device.sink.mark(Kind.START_ITER, -1, self.iter_id, HOST, flags)
        self._step_iteration("start_iter")
        self.device.iteration = self.iter_id
        self.counts_now = self.enable_statistic
        updates = self.enable_update_weights and self.is_dynamic_routing()
        self._group_now = schedule.begin(self.iter_id) if updates else ()
        try:
            self._begin_resident()
        except BaseException:
            self.abort_iter()
            raise

    def end_iter(self) -> None:
        """End the iteration; every dynamic layer has run."""
        iteration = self.iter_id
        self.device.sink.mark(Kind.END_ITER, -1, iteration, HOST)
        self._step_iteration("end_iter")
        self.probe.iterated(iteration)

    def abort_iter(self) -> None:
        """Leave an iteration that ended in an exception: every layer starts clean in the next one."""
        self.device.sink.mark(Kind.ABORT_ITER, -1, self.iter_id, HOST)
        begun = self._iter.layers_run
        self._step_iteration("abort_iter")
        self.abort_layers(begun)

    def abort_layers(self, begun: int = 0) -> None:
        """Forget what every layer was doing, `begun` of which had begun; without iterations, as in static routing."""
        self.device.discard()
        self._abort_resident()
        for layer in self.layers:
            self.updater.forget(layer.layer_idx)
            layer.abort(self.device.iteration, begun=layer.layer_idx < begun)

    def takes_update(self, layer: int) -> bool:
        """Whether the layer hands its load over for a plan in this iteration."""
        return layer in self._group_now and self.layers[layer].updates.pending is None

    # -- agreement: the sum over ranks of layer m carries the vote on the plan of the layer that runs next ------------

    def agreement_lanes(self, layer: int) -> Tensor:
        """This rank's vote that rides with the statistics of `layer`, int64 [5]."""
        carried = self._carried(layer)
        return agreement.lanes(carried.lanes_digest() if carried else None).to(self.device.torch_device)

    def settle(self, layer: int, summed: Tensor) -> None:
        """The sum of all ranks' votes that rode with the statistics of `layer`."""
        carried = self._carried(layer)
        if carried is not None:
            carried.settle(agreement.outcome(summed.cpu()))

    def _carried(self, layer: int) -> LayerUpdate | None:
        following = (layer + 1) % len(self.layers)
        due = self.device.iteration + (following == 0)
        updates = self.layers[following].updates
        pending = updates.pending
        return updates if pending is not None and pending.due == due and pending.agreed is None else None

    # -- end ---------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Stop the updater and remove this rank's shared memory. Call it on every rank; a second call does nothing."""
        try:
            self.updater.stop()
            if self._peers is not None:
                self._peers.close()  # not where the updater goes on: it may be copying from there
        finally:
            while self._unpin:
                self._unpin.pop()()
            for layer in self.layers:
                layer.updates.host.close()

    def _finalized(self) -> UpdateSchedule:
        if self._schedule is None:
            raise BalancerError(
                "E147", "the model is not finalized", hint="call finalize_model() after loading weights"
            )
        return self._schedule

    def _step_iteration(self, what: IterCall) -> None:
        unfinished = tuple(layer.layer_idx for layer in self.layers if layer.unfinished)
        layers = len(self.layers) if self.is_dynamic_routing() else 0
        try:
            self._iter = iter_step(self._iter, what, layers=layers, unfinished=unfinished)
        except Illegal as error:
            raise violation(-1, self.iter_id, error) from None

    def _agree_on_instance(self) -> str:
        """A name that all ranks share: rank 0's draw, passed on as integers."""
        name = new_instance()
        if self.group is None or self.ep_size == 1:
            return name
        value = torch.tensor([int(name, 16) if self.ep_rank == 0 else 0], dtype=torch.int64)
        dist.all_reduce(value, group=self.group)
        return f"{int(value):012x}"
