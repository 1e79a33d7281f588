"""The three collectives of a dispatch over a process group; a group of one rank (or None) sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.device.host_staged import for_backend

__all__ = ["Ranks"]

# torch is renaming these two; the old names warn where the new ones exist.
_all_gather = cast("Callable[..., Any]", getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)
_reduce_scatter = cast("Callable[..., Any]", getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)


class Ranks:
    """The expert-parallel ranks: `rank` of this process and `size` R of the group."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()

    def all_gather(self, block: Tensor) -> Tensor:
        """Blocks [N, W] of all ranks, in order of rank, as [R * N, W]. N and W are the same on all ranks."""
        if self.size == 1:
            return block
        sent = for_backend(self._group, block)
        gathered = sent.new_empty(self.size * block.shape[0], *block.shape[1:])
        _all_gather(gathered, sent, group=self._group)
        return gathered.to(block.device)

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first `send[0]` rows to rank 0 and so on; return `receive[r]` rows of every rank r, in order."""
        if self.size == 1:
            return rows
        sent = for_backend(self._group, rows)
        received = sent.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, sent, list(receive), list(send), group=self._group)
        return received.to(rows.device)

    def reduce_scatter(self, blocks: Tensor) -> Tensor:
        """Sum of every rank's block [N, W] for this rank, out of [R * N, W]."""
        if self.size == 1:
            return blocks
        sent = for_backend(self._group, blocks)
        block = torch.empty(blocks.shape[0] // self.size, *blocks.shape[1:], dtype=blocks.dtype, device=sent.device)
        _reduce_scatter(block, sent, group=self._group)
        return block.to(blocks.device)
