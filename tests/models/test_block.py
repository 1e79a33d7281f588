"""MoeBlock: the shared expert beside the routed ones, the router's dtype, the shape of the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import Kind
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import AuxStreamType, Device, Stream, get_device
from moe_eplb.models import MoeBlock, SharedExpert
from moe_eplb.moe import RenormalizeMoeRoutingMethod, create_moe
from tests.support.moe_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, ListSink, expert_weights

SHARED = AuxStreamType.MoeShared


def _shared(gated: bool = False) -> SharedExpert:
    generator = torch.Generator().manual_seed(77)
    up, down = (torch.randn(shape, generator=generator) / 4 for shape in ((24, HIDDEN), (HIDDEN, 12)))
    return SharedExpert(up, down, torch.randn(1, HIDDEN, generator=generator) if gated else None)


def _block(
    device: Device, shared: SharedExpert | None, streams: dict[AuxStreamType, Stream] | None = None, **options: Any
) -> MoeBlock:
    moe = create_moe(
        RenormalizeMoeRoutingMethod(TOP_K), num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    router = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(78))
    block = MoeBlock(router, moe, device, shared=shared, aux_stream_dict=streams, **options)
    block.load_weights(expert_weights)
    return block


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_the_shared_expert_is_added(gated: bool, seed: int | None) -> None:
    device = get_device("cpu", ListSink(), seed=seed)
    x = torch.randn(5, HIDDEN)
    shared = _shared(gated)
    up, gate = (x @ shared.w3_w1.T).chunk(2, dim=-1)
    wanted = (nn.functional.silu(gate) * up) @ shared.w2.T
    if shared.gate is not None:
        wanted = wanted * torch.sigmoid(x @ shared.gate.T)
    torch.testing.assert_close(_block(device, shared)(x), _block(device, None)(x) + wanted)


def test_it_runs_on_its_stream_and_is_joined_before_its_value_is_used() -> None:
    sink = ListSink()
    device = get_device("cpu", sink, seed=0)
    streams = {kind: device.stream(kind) for kind in AuxStreamType}
    block = _block(device, _shared(), streams)
    sink.records.clear()
    block(torch.randn(5, HIDDEN))
    placed = {kind: stream for kind, stream, _ in sink.records}
    assert placed[Kind.SHARED_EXPERT] == streams[SHARED].index
    assert placed[Kind.EXPERTS] == device.main.index
    assert device.pending() == 0


def test_a_dictionary_without_its_stream_is_refused() -> None:
    device = get_device("cpu", ListSink())
    with pytest.raises(BalancerError, match=r"E140(.|\n)*MoeShared"):
        _block(device, _shared(), {AuxStreamType.MoeChunkingOverlap: device.main})
    assert _block(device, None, {AuxStreamType.MoeChunkingOverlap: device.main}).shared is None


@pytest.mark.parametrize("shape", [(6, HIDDEN), (2, 3, HIDDEN), (1, 1, HIDDEN), (0, HIDDEN), (2, 0, HIDDEN)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    device = get_device("cpu", ListSink())
    x = torch.randn(shape)
    block = _block(device, _shared())
    y = block(x)
    assert y.shape == x.shape
    assert torch.equal(y.flatten(), block(x.reshape(-1, HIDDEN)).flatten())


def test_the_router_computes_in_the_dtype_it_is_given() -> None:
    device, x = get_device("cpu", ListSink()), torch.randn(4, HIDDEN).bfloat16()
    plain, exact = _block(device, None), _block(device, None, router_dtype=torch.float32)
    assert plain.router_logits(x).dtype == torch.bfloat16
    assert torch.equal(exact.router_logits(x), x.float() @ exact.router.T)


class SharedOutputs(NullProbe):
    """Keeps what the probe sees of the shared expert and of the whole block."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.blocks: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def shared_output(self, layer: int, x: Any, y: Any) -> None:
        self.seen.append((layer, x, y))

    def block_output(self, layer: int, x: Any, y: Any) -> None:
        assert len(self.seen) == len(self.blocks) + 1
        self.blocks.append((layer, x, y))


def test_a_probe_sees_the_shared_experts_output() -> None:
    device, x, shared = get_device("cpu", ListSink()), torch.randn(4, HIDDEN), _shared()
    block, probe = _block(device, shared), SharedOutputs()
    block.moe.probe = probe
    y = block(x)
    [(layer, seen_x, seen_y)] = probe.seen
    assert layer == 0
    assert torch.equal(seen_x, x)
    assert torch.equal(seen_y, shared(x))
    [(layer, seen_x, seen_y)] = probe.blocks
    assert (layer, torch.equal(seen_x, x), torch.equal(seen_y, y)) == (0, True, True)
