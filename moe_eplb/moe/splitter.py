"""Splits the forwards of a layer into chunks, alike on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import Kind
from moe_eplb.device import Device
from moe_eplb.moe.chunking import Chunk, chunk_count, split
from moe_eplb.moe.dispatch.collectives import Ranks

__all__ = ["Splitter"]


class Splitter:
    """Knows the limit, and how many tokens every rank has.

    Args:
        device, layer: Where and for which layer the exchange of token counts is recorded.
        ranks: The ranks that make equally many chunks.
        limit: The most tokens of all ranks in a chunk; None for no limit.
        padded: Whether the dispatch pads every rank's tokens to the fullest rank's.
    """

    def __init__(self, device: Device, layer: int, ranks: Ranks, limit: int | None, *, padded: bool) -> None:
        self._device, self._layer, self._ranks = device, layer, ranks
        self._limit, self._padded = limit, padded

    def chunks(self, tokens: int, all_rank_num_tokens: Sequence[int] | None, *, first: bool, last: bool) -> list[Chunk]:
        """The chunks of a forward of T tokens on this rank.

        Args:
            tokens: T.
            all_rank_num_tokens: T of each rank; None lets several ranks exchange it where there is a limit.
            first, last: Whether the forward is the layer's first or last in this iteration.

        Raises:
            BalancerError: E156 when `all_rank_num_tokens` is not one number a rank, or not this rank's.
        """
        table = self._table(tokens, all_rank_num_tokens)
        if table is None:
            return split(tokens, 1, first=first, last=last)
        self._check(table, tokens)
        chunks = chunk_count(table, self._limit, padded=self._padded)
        # Each rank makes its parts in the same way, so one can say how large those of the others are.
        parts = zip(*([part.rows.stop - part.rows.start for part in split(t, chunks)] for t in table), strict=True)
        return [
            replace(chunk, tokens=sizes)
            for chunk, sizes in zip(split(tokens, chunks, first=first, last=last), parts, strict=True)
        ]

    def _table(self, tokens: int, given: Sequence[int] | None) -> Sequence[int] | None:
        """T of each rank; None where no one has told it and nothing needs it."""
        if given is not None:
            return given
        if self._ranks.size == 1:
            return (tokens,)
        return None if self._limit is None else self._exchange(tokens)

    def _exchange(self, tokens: int) -> list[int]:
        gather = partial(self._ranks.all_gather, torch.tensor([[tokens]], device=self._device.torch_device))
        size = 8 if self._ranks.size > 1 else 0
        gathered: list[int] = self._device.run(Kind.PREPARE, self._layer, gather, a=size).flatten().tolist()
        return gathered

    def _check(self, table: Sequence[int], tokens: int) -> None:
        rank, size = self._ranks.rank, self._ranks.size
        if len(table) != size or table[rank] != tokens:
            raise BalancerError(
                "E156", "all_rank_num_tokens disagrees with this rank",
                why=f"{list(table)} for {size} ranks, rank {rank} has {tokens} tokens",
                hint="give every rank's number of tokens of this forward, in order of rank",
            )  # fmt: skip
