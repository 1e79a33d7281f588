"""One constructor for all backends: the same output, the right streams, no option silently ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_eplb.balancer import MoeLoadBalancer
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import AuxStreamType, Device, get_device
from moe_eplb.moe import FusedMoE, GroupedMoE, RenormalizeMoeRoutingMethod, WideEPMoE, create_moe
from tests.support.moe_layers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    ListSink,
    Watch,
    expert_weights,
    reference,
    tokens_of,
)

BACKENDS = {"wide_ep": WideEPMoE, "grouped": GroupedMoE, "fused": FusedMoE}


def _create(device: Device, backend: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    moe = create_moe(
        RenormalizeMoeRoutingMethod(TOP_K),
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        dtype=dtype,
        device=device,
        backend=backend,
        **options,
    )
    moe.load_weights(lambda expert: expert_weights(expert, dtype=dtype))
    return moe


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_computes_the_reference(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    moe = _create(get_device("cpu", NullSink()), backend, dtype)
    kind: type = type(moe)
    assert kind is BACKENDS[backend]
    moe.probe = Watch()
    x, logits, _ = tokens_of(0, 11, dtype=dtype)
    y = moe(x, logits)
    assert y.dtype == dtype
    wanted = reference(*moe.probe.seen[:3])
    assert (y.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_output(backend: str) -> None:
    moe = _create(get_device("cpu", NullSink()), backend)
    assert moe(torch.zeros(0, HIDDEN), torch.zeros(0, EXPERTS)).shape == (0, HIDDEN)


@pytest.mark.parametrize("backend", ["grouped", "fused"])
def test_local_backends_record_their_work(backend: str) -> None:
    sink = ListSink()
    moe = _create(get_device("cpu", sink), backend, layer_idx=4)
    x, logits, _ = tokens_of(0, 5)
    moe(x, logits)
    assert sink.records == [(Kind.TOPK, 0, 5), (Kind.EXPERTS, 0, 5 * TOP_K)]


@pytest.mark.parametrize("backend", ["grouped", "fused"])
def test_local_backends_get_the_chunking_stream_alone(backend: str) -> None:
    device = get_device("cpu", NullSink())
    streams = {kind: device.stream(kind) for kind in AuxStreamType}
    moe = _create(device, backend, aux_stream_dict=streams)
    assert moe.aux_stream is streams[AuxStreamType.MoeChunkingOverlap]
    assert not hasattr(moe, "aux_stream_dict")
    with pytest.raises(BalancerError, match=r"E140(.|\n)*MoeChunkingOverlap"):
        _create(device, backend, aux_stream_dict={AuxStreamType.MoeBalancer: streams[AuxStreamType.MoeBalancer]})


def test_wide_ep_gets_the_whole_dictionary() -> None:
    device = get_device("cpu", NullSink())
    streams = {kind: device.stream(kind) for kind in AuxStreamType}
    assert _create(device, "wide_ep", aux_stream_dict=streams).aux_stream_dict is streams


def test_without_a_dictionary_layers_make_their_own_streams() -> None:
    device = get_device("cpu", NullSink())
    own = _create(device, "wide_ep").aux_stream_dict
    assert set(own) == {AuxStreamType.MoeChunkingOverlap, AuxStreamType.MoeBalancer}
    names = {backend: _create(device, backend).aux_stream.name for backend in ("grouped", "fused")}
    assert set(names.values()) == {AuxStreamType.MoeChunkingOverlap.name}


def test_options_that_a_backend_cannot_use_are_refused() -> None:
    device = get_device("cpu", NullSink())
    with pytest.raises(BalancerError, match=r"E158(.|\n)*num_slots"):
        _create(device, "grouped", num_slots=8)
    with pytest.raises(BalancerError, match=r"E158(.|\n)*vanilla"):
        _create(device, "vanilla")
    with MoeLoadBalancer(0, 1, 1, device=device), pytest.raises(BalancerError, match=r"E158(.|\n)*cannot be balanced"):
        _create(device, "fused")
