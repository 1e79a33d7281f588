"""The MoE layers that are timed, and what they are timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import Device
from moe_eplb.moe import DefaultMoeRoutingMethod, MoeShape, WideEPMoE
from moe_eplb.moe.grouped_mm import grouped_mm

__all__ = [
    "CASES",
    "Case",
    "Grouped",
    "Inputs",
    "drawn",
    "gemms_alone",
    "group",
    "make_inputs",
    "make_layer",
    "obvious",
    "untimed_cuda",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """A layer's sizes, the tokens of a forward, and what it shall reach.

    `least_speedup` is against the obvious composition; `least_gemm_share` is the share of its time that the two grouped
    GEMMs alone take. None where nothing is asked.
    """

    name: str
    tokens: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    least_speedup: float | None = None
    least_gemm_share: float | None = None

    @property
    def flop(self) -> int:
        """Of the two grouped GEMMs of one forward."""
        return 6 * self.tokens * self.top_k * self.hidden * self.intermediate


CASES = (
    Case("qwen3-30b, 32768 tokens", 32768, 128, 2048, 768, 8, 2.0, 0.76),
    Case("qwen3-30b, 8192 tokens", 8192, 128, 2048, 768, 8),
    Case("qwen3-30b, 128 tokens", 128, 128, 2048, 768, 8, None, 1 / 1.1),
    Case("deepseek-v3 slice, 4096 tokens", 4096, 32, 7168, 2048, 8, 1.4, 0.85),
    Case("mixtral, 8192 tokens", 8192, 8, 4096, 14336, 2),
)


class Inputs(NamedTuple):
    """Hidden states [T, D] and router logits float32 [T, E]."""

    x: Tensor
    logits: Tensor


class Grouped(NamedTuple):
    """Rows [N, D] and activations [N, I] by expert, with the ends int32 [E] of the experts."""

    rows: Tensor
    activations: Tensor
    offs: Tensor


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """A bfloat16 tensor of that shape on the generator's GPU, standard normal."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)


def make_layer(case: Case, device: Device, dtype: torch.dtype = torch.bfloat16) -> WideEPMoE:
    """The layer of one rank with random weights, not balanced."""
    shape = MoeShape(case.experts, case.top_k, case.hidden, case.intermediate, dtype)
    layer = WideEPMoE(DefaultMoeRoutingMethod(case.top_k), shape, device)
    generator = torch.Generator(device.torch_device).manual_seed(1)
    for name in ("w3_w1", "w2"):
        weight = layer.experts.weight(name)
        weight.normal_(std=weight.shape[2] ** -0.5, generator=generator)
    return layer


def make_inputs(case: Case, seed: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random states and logits; the logits choose experts nearly evenly."""
    generator = torch.Generator(device).manual_seed(100 + seed)
    x = torch.randn(case.tokens, case.hidden, generator=generator, device=device).to(dtype)
    return Inputs(x, torch.randn(case.tokens, case.experts, generator=generator, device=device))


def obvious(inputs: Inputs, top_k: int, w3_w1: Tensor, w2: Tensor) -> Tensor:
    """The layer as one would write it in torch: output [T, D] in the dtype of x."""
    x = inputs.x
    scales, ids = torch.softmax(inputs.logits, dim=-1).topk(top_k, dim=-1)
    order, token, offs = _sorted(ids, w2.shape[0])
    up, gate = grouped_mm(x.index_select(0, token), w3_w1.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    output = grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=offs)
    output = output * scales.flatten()[order].unsqueeze(1).to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, output)


def group(inputs: Inputs, top_k: int, w3_w1: Tensor, w2: Tensor) -> Grouped:
    """What the two grouped GEMMs of `obvious` get."""
    ids = torch.softmax(inputs.logits, dim=-1).topk(top_k, dim=-1).indices
    _, token, offs = _sorted(ids, w2.shape[0])
    rows = inputs.x.index_select(0, token)
    up, gate = grouped_mm(rows, w3_w1.transpose(1, 2), offs=offs).chunk(2, dim=-1)
    return Grouped(rows, torch.nn.functional.silu(gate) * up, offs)


def gemms_alone(grouped: Grouped, w3_w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The two products and nothing between them."""
    up_gate = grouped_mm(grouped.rows, w3_w1.transpose(1, 2), offs=grouped.offs)
    return up_gate, grouped_mm(grouped.activations, w2.transpose(1, 2), offs=grouped.offs)


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries by expert, their tokens, and the ends int32 [E]."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return order, order.div(ids.shape[1], rounding_mode="floor"), ends


def untimed_cuda() -> Device:
    """The GPU without the events around each piece of work, which a graph cannot read."""
    from moe_eplb.device.cuda import CudaDevice

    class Untimed(CudaDevice):
        def run(self, kind: Kind, layer: int, fn: Callable[[], T], *, a: int = 0, b: int = 0) -> T:
            return fn()

    return Untimed(NullSink())
