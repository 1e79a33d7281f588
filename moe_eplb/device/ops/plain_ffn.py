"""The experts' two products and SwiGLU between them in plain torch; see `plain`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

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


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, offs: Tensor, each: int, cells: Tensor | None = None) -> Tensor:
    """``silu(w1 x) * (w3 x)`` [N, I] of rows x [N, D] in groups, each of which has weights of its own.

    The bits of `grouped_product` and `swiglu` after each other.

    Args:
        rows: In order of their groups.
        w3_w1: [C, 2I, D], the rows of w3 before those of w1; contiguous, as `offs` and `cells` are.
        offs: int32 [G], end of each group's rows, none beyond N; results of rows after the last end hold anything.
        each: Rows that a group probably has; the result does not depend on it.
        cells: int32 [G], which of the C weights a group has, and where that is none of them its results hold anything;
            None when group g has weights g, and then G is C.
    """
    return swiglu(grouped_product(rows, w3_w1, offs, each, cells))


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor, each: int, cells: Tensor | None = None) -> Tensor:
    """``w x`` [N, B] of rows x [N, A] in groups, as `grouped_swiglu` says; weights [C, B, A].

    Added in float32 and rounded once.
    """
    del each
    result = torch.zeros(len(rows), weights.shape[1], dtype=torch.float32, device=rows.device)
    held = range(len(offs)) if cells is None else cells.tolist()
    for cell, (begin, end) in zip(held, pairwise([0, *offs.tolist()]), strict=True):
        if 0 <= cell < len(weights):
            result[begin:end] = rows[begin:end].float() @ weights[cell].float().T
    return result.to(rows.dtype)
