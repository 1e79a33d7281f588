"""Chunks on two streams, joined at both ends; a stream dictionary that lacks the balancer's stream."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import MoeLoadBalancer, SingleLayerMoeLoadBalancer
from moe_eplb.balancer.layer_stream import LayerStream
from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import AuxStreamType, Stream, get_device
from moe_eplb.device.streams import EventType
from moe_eplb.moe import DefaultMoeRoutingMethod, MoeShape, WideEPMoE, wide_ep_setup
from tests.support.balanced import Rig, weight
from tests.support.faults.base import Fault, demand, refused

__all__ = ["FAULTS"]


class Unordered(NullSink):
    """Keeps, in words, what ran without having waited for what it must come after."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        if kind is Kind.UNORDERED:
            streams = [event.name for event in EventType]
            self.found.append(
                f"{Kind(a).name} on {streams[stream]} did not wait for {Kind(b >> 8).name} on {streams[b & 255]}"
            )


def run_chunks(rig: Rig, index: int, overlap: Stream) -> None:
    """One forward in three chunks as TensorRT-LLM lays them out: the even ones on the overlap stream.

    The first chunk takes the layer and the last one hands it over, both on the overlap stream; the chunk between them
    is on the caller's.
    """
    device, layer = rig.balancer.device, rig.layers[index]
    caller, begin, end = device.current, device.new_event(), device.new_event()
    device.record(begin, caller)
    device.wait(overlap, begin)
    for chunk, ids in enumerate(rig.ids(index, rig.balancer.iter_id).chunk(3)):
        with device.use(caller if chunk == 1 else overlap):
            if chunk == 0:
                layer.start_wait_gpu_stage()
                layer.done_wait_gpu_stage()
            layer.update_statistic_with_local_ids(ids, chunk == 0, chunk == 2)
            layer.route(ids)
            device.run(Kind.EXPERTS, index, lambda: None)
            if chunk == 2:
                layer.start_set_cpu_stage()
                layer.done_set_cpu_stage()
    device.record(end, overlap)
    device.wait(caller, end)


def check_joins() -> None:
    """By what the streams were told, every chunk reads after the wait and before the hand-over."""
    for seed in (None, 0, 1):
        sink = Unordered()
        rig = Rig(2, updates=2, empty_group="never", seed=seed, sink=sink, check_order=True)
        overlap = rig.balancer.device.stream(AuxStreamType.MoeChunkingOverlap)
        for _ in range(4):
            rig.balancer.start_iter()
            for index in range(2):
                run_chunks(rig, index, overlap)
            rig.balancer.end_iter()
        rig.balancer.shutdown()
        demand(len(rig.journal.commits) == 6, "the experts of both layers move in every iteration")
        demand(not sink.found, "; ".join(sorted(set(sink.found))))


def first_chunk_alone_waits(patch: pytest.MonkeyPatch) -> None:
    """A chunk on another stream than the first one's does not join the wait."""

    def read(self: LayerStream) -> None:
        if self._device.current not in self._readers:
            self._readers.append(self._device.current)

    patch.setattr(LayerStream, "read", read)


def last_chunk_alone_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    """The hand-over waits for the stream that it is called on."""
    patch.setattr(LayerStream, "end_reading", lambda self: self._follow(self._device.current))


def check_weights_that_are_read() -> None:
    """By the bytes: a chunk whose experts run late still reads the weights that its routing meant."""
    for seed in range(8):
        rig = Rig(2, updates=2, empty_group="never", seed=seed)
        device = rig.balancer.device
        # One for each layer: on a common one the layers would wait for one another, and nothing could run late.
        overlap = [device.stream(AuxStreamType.MoeChunkingOverlap) for _ in rig.layers]
        read: list[tuple[Tensor, Tensor]] = []
        for _ in range(5):
            rig.balancer.start_iter()
            for index, layer in enumerate(rig.layers):
                ids = rig.ids(index, rig.balancer.iter_id)
                wanted = torch.stack([weight(index, expert) for expert in ids.flatten().tolist()])
                take(layer)
                layer.update_statistic_with_local_ids(ids, True, True)
                with device.use(overlap[index]):
                    slots = layer.route(ids)
                    late = partial(use_weights, rig.storage[index], slots, wanted, read)
                    device.submit(overlap[index], Kind.EXPERTS, index, late)
                layer.route(ids[:1])
                layer.start_set_cpu_stage()
                layer.done_set_cpu_stage()
            rig.balancer.end_iter()
        device.synchronize()
        rig.balancer.shutdown()
        demand(len(rig.journal.commits) == 8 and len(read) == 10, "everything has run")
        right = all(torch.equal(found, wanted) for found, wanted in read)
        demand(right, "a chunk read weights that had been overwritten under it")


def use_weights(storage: Tensor, slots: Tensor, wanted: Tensor, read: list[tuple[Tensor, Tensor]]) -> None:
    read.append((storage[slots.flatten(), :, :4], wanted))


def take(layer: SingleLayerMoeLoadBalancer) -> None:
    layer.start_wait_gpu_stage()
    layer.done_wait_gpu_stage()


def check_stream_dictionary() -> None:
    """A dictionary without MoeBalancer is refused where the layer is built, and the message says what to add."""
    device = get_device("cpu", NullSink())
    streams = {AuxStreamType.MoeChunkingOverlap: device.stream(AuxStreamType.MoeChunkingOverlap)}
    shape = MoeShape(4, 2, 8, 8, torch.float32)

    def build() -> None:
        with MoeLoadBalancer(0, 1, 1, device=device):
            try:
                WideEPMoE(DefaultMoeRoutingMethod(2), shape, device, aux_stream_dict=streams)
            except KeyError as error:
                raise AssertionError(f"the layer fails with a bare KeyError: {error}") from error

    error = refused(build, "E140", "a dictionary without MoeBalancer")
    demand("MoeBalancer: device.stream(" in error.hint, f"the hint names no fix: {error.hint}")
    demand("MoeChunkingOverlap" in error.why, f"what the dictionary has is not told: {error.why}")


def dictionary_unread_at_construction(patch: pytest.MonkeyPatch) -> None:
    """Construction takes any dictionary as it is."""
    patch.setattr(wide_ep_setup, "_streams", lambda device, given: given)


def dictionary_looked_up(patch: pytest.MonkeyPatch) -> None:
    """The stream is looked up as if it were there."""
    patch.setattr(wide_ep_setup, "required_stream", lambda streams, kind, why: streams[kind])


FAULTS = [
    Fault(
        "a chunk on another stream routes before the wait is joined", check_joins, first_chunk_alone_waits,
        r"ROUTE on Main did not wait for START_WAIT_GPU_STAGE on MoeBalancer",
    ),
    Fault(
        "a chunk on another stream still reads at the hand-over", check_joins, last_chunk_alone_is_waited_for,
        r"^START_SET_CPU_STAGE on MoeBalancer did not wait for (ROUTE|EXPERTS) on Main$",
    ),
    Fault(
        "a chunk on another stream reads weights that are overwritten", check_weights_that_are_read,
        last_chunk_alone_is_waited_for, "a chunk read weights that had been overwritten under it",
    ),
    Fault(
        "a stream dictionary without MoeBalancer fails late", check_stream_dictionary,
        dictionary_unread_at_construction, "a dictionary without MoeBalancer: was not refused",
    ),
    Fault(
        "a stream dictionary without MoeBalancer fails with KeyError", check_stream_dictionary, dictionary_looked_up,
        r"bare KeyError: <AuxStreamType.MoeBalancer",
    ),
]  # fmt: skip
