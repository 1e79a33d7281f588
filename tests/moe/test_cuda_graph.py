"""A forward on a GPU waits for nothing and can be captured; its output is that of the exact path."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import Device, get_device
from moe_eplb.moe import MoeShape, RenormalizeNaiveMoeRoutingMethod, WideEPMoE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

T = TypeVar("T")
TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 700, 24, 512, 256, 4
"""More entries than the one-launch permutation takes, so that both are seen with `FEW` tokens."""
FEW = 9


DTYPES = [torch.bfloat16, torch.float8_e4m3fn]


@contextlib.contextmanager
def _waits_are_errors() -> Iterator[None]:
    """A call that waits for the GPU raises RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _layer(device: Device, dispatch: str, dtype: torch.dtype = torch.bfloat16) -> WideEPMoE:
    shape = MoeShape(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, torch.bfloat16, dtype)
    layer = WideEPMoE(RenormalizeNaiveMoeRoutingMethod(TOP_K), shape, device, num_slots=EXPERTS + 3, dispatch=dispatch)
    generator = torch.Generator().manual_seed(1)

    def weights(expert: int) -> dict[str, torch.Tensor]:
        w3_w1 = torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) / 16
        return {
            "w3_w1": w3_w1.bfloat16(),
            "w2": (torch.randn(HIDDEN, INTERMEDIATE, generator=generator) / 8).bfloat16(),
        }

    layer.load_weights(weights)
    return layer


def _inputs(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x.bfloat16().cuda(), torch.randn(tokens, EXPERTS, generator=generator).cuda()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A GPU without the timing events around each piece of work, which a graph cannot hold."""
    device = get_device("cuda", NullSink())

    def run(kind: Kind, layer: int, fn: Callable[[], T], **numbers: Any) -> T:
        return fn()

    monkeypatch.setattr(device, "run", run)
    return device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [FEW, TOKENS])
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather", "symm_mem"])
def test_a_replay_computes_what_the_exact_path_does(
    untimed: Device, dispatch: str, tokens: int, dtype: torch.dtype
) -> None:
    layer = _layer(untimed, dispatch, dtype)
    x, logits = _inputs(tokens, 0)
    with torch.inference_mode():
        for _ in range(2):
            layer(x, logits, [tokens])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, logits, [tokens])
        for seed in (1, 2):
            new_x, new_logits = _inputs(tokens, seed)
            x.copy_(new_x)
            logits.copy_(new_logits)
            graph.replay()
            layer._dispatcher.static_shapes = False
            wanted = layer(new_x, new_logits)
            layer._dispatcher.static_shapes = True
            if dtype is torch.bfloat16:
                assert torch.equal(y, wanted)
            else:  # its GEMM adds in an order that goes by the number of rows, and what is rounded then by a step
                assert (y - wanted).abs().max() <= 0.03 * wanted.abs().max()
            assert wanted.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, FEW, TOKENS])
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather", "symm_mem"])
def test_an_eager_forward_waits_for_nothing(untimed: Device, dispatch: str, tokens: int, dtype: torch.dtype) -> None:
    layer = _layer(untimed, dispatch, dtype)
    x, logits = _inputs(tokens, 0)
    with torch.inference_mode():
        layer(x, logits, [tokens])
        torch.cuda.synchronize()
        with _waits_are_errors():
            y = layer(x, logits, [tokens])
    assert y.shape == x.shape


@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
def test_without_static_shapes_a_forward_waits(untimed: Device, dispatch: str) -> None:
    layer = _layer(untimed, dispatch)
    layer._dispatcher.static_shapes = False
    x, logits = _inputs(FEW, 0)
    layer(x, logits)
    with _waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        layer(x, logits)
