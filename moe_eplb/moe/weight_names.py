"""What the tensors of an expert are called."""

from __future__ import annotations

import torch

from moe_eplb.device.ops import FP8

__all__ = ["SCALE_NAMES", "WEIGHT_NAMES", "scale_name", "weight_names"]

WEIGHT_NAMES = ("w3_w1", "w2")
"""The matrices: "w3_w1" [2I, D], the rows of w3 before those of w1, and "w2" [D, I]."""


def scale_name(name: str) -> str:
    """The name of the scales of a matrix's rows."""
    return f"{name}_scale"


SCALE_NAMES = tuple(map(scale_name, WEIGHT_NAMES))
"""Of fp8 matrices: "w3_w1_scale" [2I] and "w2_scale" [D], float32."""


def weight_names(dtype: torch.dtype) -> tuple[str, ...]:
    """All tensors of an expert whose matrices have this dtype."""
    return WEIGHT_NAMES + SCALE_NAMES if dtype is FP8 else WEIGHT_NAMES
