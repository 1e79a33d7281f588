"""The device operations as Triton kernels; each has the signature of its twin in `plain` and gives the same result."""

from __future__ import annotations

from moe_eplb.device.ops.triton_choose import histogram, route, top_k
from moe_eplb.device.ops.triton_fp8 import permute_rows_fp8, swiglu_fp8
from moe_eplb.device.ops.triton_group import permute, permute_rows
from moe_eplb.device.ops.triton_rows import add_blocks, combine, pack_rows, swiglu

__all__ = [
    "add_blocks",
    "combine",
    "histogram",
    "pack_rows",
    "permute",
    "permute_rows",
    "permute_rows_fp8",
    "route",
    "swiglu",
    "swiglu_fp8",
    "top_k",
]
