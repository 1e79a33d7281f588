"""Rows as 32-bit words, so that one collective carries hidden states, ids and scales together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Columns", "RowFormat"]


class Columns(NamedTuple):
    """The parts of unpacked rows: hidden [M, D], scales float32 [M, K], and the integer columns int32 [M, N]."""

    hidden: Tensor
    scales: Tensor
    integers: Tensor


class RowFormat:
    """A row of D hidden values, K scales and N integers; D values must fill whole words.

    Word order: hidden states, scales, integers. The bits are moved, never converted.
    """

    def __init__(self, hidden_size: int, top_k: int, integers: int, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._widths = (hidden_size * dtype.itemsize // 4, top_k, integers)
        self.words = sum(self._widths)
        self.nbytes = 4 * self.words

    def pack(self, x: Tensor, scales: Tensor, *integers: Tensor) -> Tensor:
        """Rows int32 [M, words] of hidden states [M, D], scales float32 [M, K] and integer columns int32 [M, ...]."""
        return torch.cat((x.contiguous().view(torch.int32), scales.contiguous().view(torch.int32), *integers), dim=1)

    def unpack(self, rows: Tensor) -> Columns:
        """The parts of rows int32 [M, words]."""
        hidden, scales, integers = torch.split(rows, list(self._widths), dim=1)
        return Columns(hidden.contiguous().view(self._dtype), scales.contiguous().view(torch.float32), integers)
