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


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, offs: Tensor, each: int) -> Tensor:
    """``silu(w1 x) * (w3 x)`` [N, I] of rows x [N, D] that are grouped by cell.

    The bits of `grouped_product` and `swiglu` after each other.

    Args:
        rows: In order of their cells.
        w3_w1: [C, 2I, D], the rows of w3 before those of w1; contiguous, as `offs` is.
        offs: int32 [C], end of each cell's rows, none beyond N; results of rows after the last end hold anything.
        each: Rows that a cell probably has; the result does not depend on it.
    """
    return swiglu(grouped_product(rows, w3_w1, offs, each))


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor, each: int) -> Tensor:
    """``w x`` [N, B] of rows x [N, A] that are grouped by cell, as `grouped_swiglu` says; weights [C, B, A].

    Added in float32 and rounded once.
    """
    del each
    result = torch.zeros(len(rows), weights.shape[1], dtype=torch.float32, device=rows.device)
    for cell, (begin, end) in enumerate(pairwise([0, *offs.tolist()])):
        result[begin:end] = rows[begin:end].float() @ weights[cell].float().T
    return result.to(rows.dtype)
