"""What a model's balancer does beside a device that holds its state: replays, plans that are awaited, what is noted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist

from moe_eplb.balancer.one_reduction import OneReductionLayer
from moe_eplb.balancer.options import BalancerOptions
from moe_eplb.balancer.peers import PeerCells
from moe_eplb.balancer.resident import Resident
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.balancer.single_layer import SingleLayerMoeLoadBalancer
from moe_eplb.balancer.weight_sources import FromHost, FromPeers, Weights, WeightSource
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.core.probe import NullProbe, Probe
from moe_eplb.core.protocol import IterState, all_layers, iter_step
from moe_eplb.device import Device
from moe_eplb.device.control import Stage

__all__ = ["ResidentCalls"]


class ResidentCalls:
    """The part of `MoeLoadBalancer` that a state on the device asks for; attributes are the balancer's."""

    ep_rank: int
    layer_updates_per_iter: int
    device: Device
    group: dist.ProcessGroup | None
    options: BalancerOptions
    probe: Probe
    layers: list[SingleLayerMoeLoadBalancer]
    counts_now: bool
    _iter: IterState
    _resident: Resident | None
    _resident_layers: list[ResidentLayer]
    _peers: PeerCells | None
    _unpin: list[Callable[[], None]]
    _group_now: tuple[int, ...]

    def is_dynamic_routing(self) -> bool:
        """Whether experts move while the model runs."""
        return self.layer_updates_per_iter > 0

    @property
    def iter_id(self) -> int:
        """The iteration under way, or the next one."""
        return self._iter.next_iteration

    @property
    def layers_begun(self) -> int:
        """How many layers have begun in the iteration under way."""
        return self._iter.layers_run

    def enter_layer(self, layer: int) -> None:
        """A layer begins its iteration (called by the layer); raises `Illegal` out of turn."""
        if self.is_dynamic_routing():
            self._iter = iter_step(self._iter, "layer", layers=len(self.layers), layer=layer)

    def _layer_type(self) -> type[SingleLayerMoeLoadBalancer]:
        if not self.is_resident:
            return SingleLayerMoeLoadBalancer
        return OneReductionLayer if self.options.reduction == "iteration" else ResidentLayer

    @property
    def is_resident(self) -> bool:
        """Whether the state lives on the device, so that no forward waits for the host."""
        return self.is_dynamic_routing() and self.options.resident

    def _make_resident(self) -> None:
        options = self.options
        layers = self._resident_layers = [layer for layer in self.layers if isinstance(layer, ResidentLayer)]
        self._resident = Resident(
            self.device, len(layers), run_ahead=options.run_ahead, timeout_s=options.update_timeout_s,
            awake=options.awake_updater,
        )  # fmt: skip
        sources = self._weight_sources([layer.require_cells().cells for layer in layers])
        for layer, following, source in zip(layers, [*layers[1:], layers[0]], sources, strict=True):
            layer.finish_setup(self._resident, following, source)
            self._unpin += [self.device.pin(memory) for memory in layer.updates.host.memory()]

    def _weight_sources(self, cells: list[Sequence[Weights]]) -> list[WeightSource]:
        if self.options.weights_from == "host":
            return [FromHost(layer.updates.host, self.ep_rank) for layer in self.layers]
        self._peers = PeerCells(self.device.new_sharing(), self.group, self.ep_rank)
        return [FromPeers(of_ranks, self.ep_rank) for of_ranks in self._peers.exchange(cells)]

    def expect(self, layer: int) -> None:
        """The hand-over of a layer is enqueued; where it is the layer's turn, the updater waits for it."""
        if layer in self._group_now:
            self._resident_layers[layer].expect(self.device.iteration)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """The forward inside is captured into a graph: its calls are checked, nothing runs and no iteration passes.

        Raises:
            BalancerError: E177 where a replay could not do the balancer's work, E178 inside an iteration.
        """
        if self.is_dynamic_routing() and self._resident is None:
            raise BalancerError(
                "E177", "forwards of this balancer cannot be captured into a graph",
                why="its state lives on the host, which a replay does not ask",
                hint="use BalancerOptions(resident=True)",
            )  # fmt: skip
        if self._iter.in_iter:
            raise BalancerError(
                "E178", f"a capture inside iteration {self.iter_id}", why="a capture executes nothing",
                hint="capture between two iterations",
            )  # fmt: skip
        before, self._iter = self._iter, self._iter._replace(in_iter=True)
        try:
            yield
        except BaseException:
            for layer in self.layers:
                layer.restart()
            raise
        finally:
            self._iter = before

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """A graph of all layers is launched inside, in place of this iteration's forward.

        Waits first for the plans on which the device votes in it. With `commit_delay` 1 that of the first layer is made
        from what the graph itself hands over; with 2, and 3 where there is one reduction an iteration, the host need
        not wait for the iteration before to end.
        """
        self.await_plans()
        yield
        if self.is_dynamic_routing():
            self._iter = all_layers(self._iter, len(self.layers))
        for index in self._group_now:
            self.expect(index)

    def await_plans(self) -> None:
        """Return when all plans on which the device votes in this iteration are enqueued; see `Resident`."""
        if not self.device.immediate and not self.device.capturing:
            for layer in self._resident_layers:
                layer.await_plan(self.iter_id)

    def collect_layer(self, layer: int) -> None:
        """See `collect`; the layer has begun this iteration."""
        self._resident_layers[layer].collect(self.device.iteration)

    def collect(self) -> None:
        """Take note of what a device that works later has done in this iteration; it has finished."""
        if self._resident is None or self.device.immediate:
            return
        self._take_note(self._resident)
        self._resident.check()

    def _take_note(self, resident: Resident) -> None:
        self._collect(self.device.iteration)
        stages = resident.model.stages.tolist()
        for index, iterations in enumerate(stages):
            for stage, iteration in enumerate(iterations):
                self.device.sink.mark(Kind.DEVICE_STAGE, index, iteration, HOST, a=stage)
        if self.counts_now and type(self.probe) is not NullProbe:  # to look at the counts takes a copy each
            for layer, iterations in zip(self._resident_layers, stages, strict=True):
                if iterations[Stage.FOLD] == self.device.iteration:  # not where it was aborted before
                    layer.report_counts()

    def _begin_resident(self) -> None:
        """An iteration has begun; raises BalancerError E134 where a count of an earlier one went beyond int32."""
        if self._resident is None:
            return
        self._resident.check()
        self._resident.begin(self.iter_id, self.counts_now, self._group_now)
        if not self.device.immediate:
            # The device has begun the iteration `run_ahead` before this one: it has ended all before that.
            self._collect(self.iter_id - self.options.run_ahead - 1)

    def _abort_resident(self) -> None:
        """An iteration was aborted, and the device is idle."""
        if self._resident is None:
            return
        self._resident.skip(self.device.iteration)
        if not self.device.immediate:
            self._take_note(self._resident)
        # Behind a launch an exception may have come before the host noted which hand-overs were in it.
        self._resident.expected = int(self._resident.model.rung)

    def _collect(self, iteration: int) -> None:
        for layer in self._resident_layers:
            layer.collect_until(iteration)
