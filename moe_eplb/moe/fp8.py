"""Expert weights in fp8 with a scale for each of their rows, and products with them.

An expert is then ``w3_w1`` float8_e4m3fn [2I, D] with ``w3_w1_scale`` float32 [2I], and ``w2`` [D, I] with ``w2_scale``
[D]; row r stands for ``w3_w1[r] * w3_w1_scale[r]``. Rows of activations are quantised on the fly in the same way. A GPU
multiplies in torch's scaled grouped GEMM, which takes two scales a product out of the sum, so both are exact in it. Its
tensor cores add with fewer bits than float32 has (`use_fast_accum`), by which sums of some thousand products are off by
about what rounding them to bfloat16 costs; to add in float32 takes up to three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.device.ops import FP8
from moe_eplb.moe.grouped_mm import grouped_mm
from moe_eplb.moe.weight_names import SCALE_NAMES, scale_name

__all__ = ["in_expert_dtype", "require_fp8", "scaled_product"]

_Product = Callable[..., Tensor]


def in_expert_dtype(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """An expert's weights as its slots hold them: quantised for fp8 unless they come with scales, else as `dtype`.

    What is missing stays missing.
    """
    if dtype is not FP8:
        return {name: tensor.to(dtype) for name, tensor in weights.items()}
    if any(name in weights for name in SCALE_NAMES):
        return dict(weights)
    quantized = {name: ops.quantize_rows(tensor) for name, tensor in weights.items()}
    return dict(chain.from_iterable(((n, rows), (scale_name(n), scale)) for n, (rows, scale) in quantized.items()))


def require_fp8(device: torch.device) -> None:
    """Refuse a GPU without scaled grouped GEMM.

    Raises:
        BalancerError: E188.
    """
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10) or not hasattr(torch, "_scaled_grouped_mm"):
        raise BalancerError(
            "E188", "fp8 experts cannot be multiplied here",
            why=f"torch {torch.__version__} has scaled grouped GEMM for compute capability 9.x and 10.x at most, this "
            f"GPU's is {major}.{minor}",
            hint="use a Hopper GPU, or dtype bfloat16",
        )  # fmt: skip


def scaled_product(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor) -> Tensor:
    """Products bfloat16 [N, B] of rows that are grouped by cell with their cell's weights.

    Args:
        rows: fp8 [N, A], those after the last end hold anything; so do their products.
        row_scale: float32 [N].
        weight: fp8 [G, B, A].
        weight_scale: float32 [G, B].
        offs: int32 [G], the end of each cell's rows.
    """
    if not len(rows):
        return torch.empty(0, weight.shape[1], dtype=torch.bfloat16, device=rows.device)
    if not rows.is_cuda:
        return _dequantized_product(rows, row_scale, weight, weight_scale, offs)
    multiply = cast("_Product", torch._scaled_grouped_mm)
    return multiply(
        rows, weight.transpose(1, 2), row_scale, weight_scale, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _dequantized_product(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor) -> Tensor:
    product = grouped_mm(rows.to(torch.float32), weight.to(torch.float32).transpose(1, 2), offs=offs)
    cell = torch.searchsorted(offs, torch.arange(len(rows), dtype=offs.dtype), right=True).clamp(max=len(offs) - 1)
    return (product * row_scale.unsqueeze(1) * weight_scale[cell]).to(torch.bfloat16)
