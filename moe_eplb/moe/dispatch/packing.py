"""Rows as 32-bit words, so that one collective carries hidden states, ids and scales together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_eplb.device import ops

__all__ = ["WIDE", "Columns", "RowFormat"]

WIDE = 16
"""Words to which rows are aligned so that a GPU reads 16 bytes at a time at any column."""
_WORD = 4


class Columns(NamedTuple):
    """The parts of unpacked rows: hidden [M, D], scales float32 [M, K], and the integer columns int32 [M, N]."""

    hidden: Tensor
    scales: Tensor
    integers: Tensor


class RowFormat:
    """A row of D hidden values, K scales and N integers; D values must fill whole words.

    Word order: hidden states, scales, integers, nothing up to a multiple of `align` words. The bits are moved, never
    converted.
    """

    def __init__(self, hidden_size: int, top_k: int, integers: int, dtype: torch.dtype, *, align: int = 1) -> None:
        self._dtype = dtype
        self._widths = (hidden_size * dtype.itemsize // _WORD, top_k, integers)
        self.words = -(-sum(self._widths) // align) * align
        self.nbytes = _WORD * self.words
        self.hidden_words = self._widths[0]

    def pack(self, x: Tensor, scales: Tensor, *integers: Tensor) -> Tensor:
        """Rows int32 [M, words] of hidden states [M, D], scales float32 [M, K] and integer columns int32 [M, ...]."""
        return self.pack_block(x.shape[0], x, scales, *integers)

    def pack_block(self, block: int, x: Tensor, scales: Tensor, *integers: Tensor) -> Tensor:
        """Rows int32 [B, words] of T <= B rows as for `pack`; the others are all -1."""
        rows = torch.empty(block, self.words, dtype=torch.int32, device=x.device)
        columns = (x.contiguous().view(torch.int32), scales.contiguous().view(torch.int32), *integers)
        ops.pack_rows(columns, rows)
        return rows

    def unpack(self, rows: Tensor) -> Columns:
        """The parts of rows int32 [M, words]: views of them, whose rows are strided."""
        hidden, scales, integers = torch.split(rows[:, : sum(self._widths)], list(self._widths), dim=1)
        if self._dtype.itemsize > _WORD:  # which only dense words can be seen as
            hidden = hidden.contiguous()
        return Columns(hidden.view(self._dtype), scales.view(torch.float32), integers)
