"""The device operations as Triton kernels; each has the signature of its twin in `plain` and gives the same result."""

from __future__ import annotations

from moe_eplb.device.ops.triton_choose import histogram, route, top_k
from moe_eplb.device.ops.triton_ffn import grouped_product, grouped_swiglu
from moe_eplb.device.ops.triton_fp8 import permute_rows_fp8, swiglu_fp8
from moe_eplb.device.ops.triton_group import permute, permute_in_parts, permute_rows
from moe_eplb.device.ops.triton_rows import add_blocks, combine, pack_rows, swiglu
from moe_eplb.device.ops.triton_sends import add_returned, arrive, order_sends, send_rows

__all__ = [
    "add_blocks",
    "add_returned",
    "arrive",
    "combine",
    "grouped_product",
    "grouped_swiglu",
    "histogram",
    "order_sends",
    "pack_rows",
    "permute",
    "permute_in_parts",
    "permute_rows",
    "permute_rows_fp8",
    "route",
    "send_rows",
    "swiglu",
    "swiglu_fp8",
    "top_k",
]
