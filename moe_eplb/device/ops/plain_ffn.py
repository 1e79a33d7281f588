"""The experts' two products and SwiGLU between them in plain torch; see `plain`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_eplb.device.ops.plain_parts import Parts

__all__ = ["grouped_product", "grouped_swiglu", "swiglu", "swiglu_float32"]


def swiglu(rows: Tensor, offs: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` [N, I] of rows [N, 2I] that hold up before gate; computed in float32.

    With `offs` int32 [G] rows after its last end are nobody's, and their results hold anything.
    """
    return swiglu_float32(rows).to(rows.dtype)


def swiglu_float32(rows: Tensor) -> Tensor:
    """The same before it is rounded."""
    up, gate = rows.to(torch.float32).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, parts: Parts) -> Tensor:
    """``silu(w1 x) * (w3 x)`` [N, I] of rows x [N, D] in groups, each of which has the weights of a cell.

    The bits of `grouped_product` and `swiglu` after each other.

    Args:
        rows: In order of their groups.
        w3_w1: [C, 2I, D], the rows of w3 before those of w1; contiguous.
        parts: Of the rows. Results of rows that are in none, or whose cell is none of the C, hold anything.
    """
    return swiglu(grouped_product(rows, w3_w1, parts))


def grouped_product(rows: Tensor, weights: Tensor, parts: Parts) -> Tensor:
    """``w x`` [N, B] of rows x [N, A] in groups, as `grouped_swiglu` says; weights [C, B, A].

    Added in float32 and rounded once.
    """
    result = torch.zeros(len(rows), weights.shape[1], dtype=torch.float32, device=rows.device)
    (count, *_), *lines = parts.table.tolist()
    for number, (cell, begin, end, first) in enumerate(lines[:count]):
        at = begin + (number - first) * parts.rows
        until = min(at + parts.rows, end)
        if 0 <= cell < len(weights):
            result[at:until] = rows[at:until].float() @ weights[cell].float().T
    return result.to(rows.dtype)
