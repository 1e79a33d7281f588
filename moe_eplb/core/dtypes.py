"""Sizes of what a scenario calls its `dtype`: that of the expert weights, and with it of everything beside them."""

from __future__ import annotations

__all__ = ["FP8", "ITEM_BYTES", "expert_tensor_bytes", "state_dtype"]

FP8 = "float8_e4m3fn"

ITEM_BYTES = {"float32": 4, "bfloat16": 2, FP8: 1}
"""Bytes of one element."""

_SCALE_BYTES = ITEM_BYTES["float32"]


def state_dtype(dtype: str) -> str:
    """The dtype of hidden states, shared experts and routers beside experts of `dtype`: fp8 is for experts alone."""
    return "bfloat16" if dtype == FP8 else dtype


def expert_tensor_bytes(dtype: str, hidden: int, intermediate: int) -> list[int]:
    """Bytes of each tensor of an expert: ``w3_w1`` [2I, D] and ``w2`` [D, I], in fp8 the scales of their rows too."""
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    sizes = [rows * columns * ITEM_BYTES[dtype] for rows, columns in shapes]
    return sizes + [rows * _SCALE_BYTES for rows, _ in shapes] if dtype == FP8 else sizes
