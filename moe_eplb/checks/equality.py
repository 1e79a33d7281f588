"""A layer's output against a slow reference that knows experts only by their logical ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "Difference", "compare", "reference_output", "shared_reference"]

TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.12}
"""Largest allowed max|a-b| / max|b| by weight dtype.

In fp8 the reference has the very weights, and rounds activations to 3 bits of mantissa before either product, as is
asked of the layer. What remains are sums in another order, after which an element may be rounded to its other
neighbour, 6 to 12 % away: much where outputs have few summands, and nothing beside many. An entry that another expert
computed is off by 140 % of its part.

In bfloat16, too, the reference rounds where the layer does, or layers of 8 columns would come to 2 %; what is left are
the roundings of the second product and of sums.
"""
_FP8, _LARGEST_FP8, _LEAST_FP8 = torch.float8_e4m3fn, 448.0, 2.0**-60


@dataclass(frozen=True, slots=True)
class Difference:
    """max|a-b|, max|b| and their ratio; a NaN anywhere makes the ratio infinite."""

    max_abs: float
    max_ref: float
    ratio: float


def reference_output(
    x: Tensor, expert_ids: Tensor, scales: Tensor, master: Callable[[int], Mapping[str, Tensor]]
) -> Tensor:
    """y float32 [T, D] from x [T, D], ids and scales [T, K], and master weights ``w3_w1`` [2I, D], ``w2`` [D, I].

    Weights that have scales of their rows, ``w3_w1_scale`` [2I] and ``w2_scale`` [D], are multiplied by them first.
    Where they are fp8, rows of activations are rounded to that before each product, too, by a scale that makes their
    largest 448 (or 2^-60 at least), and the first product to bfloat16. Where they are bfloat16, the first product and
    SwiGLU's result are rounded to that.
    """
    x = x.to(torch.float32)
    y = torch.zeros_like(x)
    for expert in torch.unique(expert_ids).tolist():
        token, k = torch.nonzero(expert_ids == expert, as_tuple=True)
        out = _feed_forward(x[token], master(int(expert)))
        y.index_add_(0, token, out * scales[token, k].to(torch.float32).unsqueeze(1))
    return y


def shared_reference(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """y float32 [T, D] of a shared expert with weights ``w3_w1``, ``w2`` and, where it has one, ``gate`` [1, D].

    In bfloat16 it rounds SiLU's result, too, before it multiplies by it, as transformers' models do.
    """
    x = x.to(torch.float32)
    y = _feed_forward(x, weights, rounded_silu=weights["w2"].dtype is torch.bfloat16)
    gate = weights.get("gate")
    return y if gate is None else torch.sigmoid(x @ gate.to(torch.float32).T) * y


def _feed_forward(rows: Tensor, weights: Mapping[str, Tensor], *, rounded_silu: bool = False) -> Tensor:
    first, second = _in_float32(weights, "w3_w1"), _in_float32(weights, "w2")
    if weights["w2"].dtype is _FP8:
        return _to_fp8_and_back(_swiglu(_to_bfloat16_and_back(_to_fp8_and_back(rows) @ first.T))) @ second.T
    if weights["w2"].dtype is torch.bfloat16:
        activated = _swiglu(_to_bfloat16_and_back(rows @ first.T), rounded_silu=rounded_silu)
        return _to_bfloat16_and_back(activated) @ second.T
    return _swiglu(rows @ first.T) @ second.T


def _swiglu(product: Tensor, *, rounded_silu: bool = False) -> Tensor:
    up, gate = product.chunk(2, dim=1)
    silu = torch.nn.functional.silu(gate)
    return (_to_bfloat16_and_back(silu) if rounded_silu else silu) * up


def _to_bfloat16_and_back(rows: Tensor) -> Tensor:
    return rows.to(torch.bfloat16).to(torch.float32)


def _to_fp8_and_back(rows: Tensor) -> Tensor:
    if not rows.numel():
        return rows
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=_LEAST_FP8)
    # In this very form: activations in bfloat16 often lie so near the middle between two neighbours that the last bit
    # of the factor decides, and torch divides a number by a tensor in two steps.
    inverse = torch.full_like(largest, _LARGEST_FP8) / largest
    return (rows * inverse).to(_FP8).to(torch.float32) * (largest / _LARGEST_FP8)


def _in_float32(weights: Mapping[str, Tensor], name: str) -> Tensor:
    matrix, scale = weights[name].to(torch.float32), weights.get(f"{name}_scale")
    return matrix if scale is None else matrix * scale.unsqueeze(1)


def compare(y: Tensor, *references: Tensor) -> Difference:
    """How far `y` is from the sum of references, relative to their largest elements.

    Those of several are added: where the parts of a sum cancel, it is not as exact as it is small.
    """
    if y.numel() == 0:
        return Difference(0.0, 0.0, 0.0)
    max_abs = float((y.to(torch.float32) - torch.stack(references).sum(dim=0)).abs().max())
    max_ref = sum(float(reference.abs().max()) for reference in references)
    if max_abs == 0.0:
        return Difference(0.0, max_ref, 0.0)
    ratio = max_abs / max_ref if max_ref > 0 else float("inf")
    return Difference(max_abs, max_ref, ratio if ratio == ratio else float("inf"))
