"""Forwards that are too large for one pass: split into chunks, every other one on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from moe_eplb.device import Device, EventType, Stream

__all__ = ["Chunk", "ChunkStreams", "chunk_count", "split"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a forward. `first` and `last` are meant within the iteration, over all forwards of the layer.

    `tokens`: rows of each rank in this part, None where nobody knows.
    """

    rows: slice
    index: int
    first: bool
    last: bool
    tokens: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The chunk's rows of a tensor [T, ...]."""
        return tensor[self.rows]


def chunk_count(all_rank_num_tokens: Sequence[int], limit: int | None, *, padded: bool) -> int:
    """How many chunks a forward takes so that no pass has more than `limit` tokens of all ranks; at least one.

    Every rank makes equally many. A limit below the number of ranks cannot be kept: then a pass has one token of each.

    Args:
        all_rank_num_tokens: T of each rank.
        limit: The most tokens of a pass, None for no limit.
        padded: Whether every rank's tokens are padded to the fullest rank's.
    """
    most = max(all_rank_num_tokens)
    if limit is None or not most:
        return 1
    tokens = [most] * len(all_rank_num_tokens) if padded else all_rank_num_tokens
    chunks = max(1, -(-sum(tokens) // limit))
    # The first parts are the longest, on every rank.
    while chunks < most and sum(-(-each // chunks) for each in tokens) > limit:
        chunks += 1
    return min(chunks, most)


def split(tokens: int, chunks: int, *, first: bool = True, last: bool = True) -> list[Chunk]:
    """`chunks` parts of T tokens, the first T mod chunks of them one longer; parts may be empty.

    Every rank gets equally many parts, because each takes part in collectives. An empty part has no rows, so nothing
    in it can be counted or computed.
    """
    size, longer = divmod(tokens, chunks)
    bounds = [index * size + min(index, longer) for index in range(chunks + 1)]
    return [
        Chunk(slice(begin, end), index, first and index == 0, last and index == chunks - 1)
        for index, (begin, end) in enumerate(pairwise(bounds))
    ]


class ChunkStreams:
    """Runs even chunks on the MoeChunkingOverlap stream and odd ones on the caller's, joined at both ends.

    A single chunk stays on the caller's stream.

    Args:
        device: Where the work runs.
        overlap: The MoeChunkingOverlap stream.
    """

    def __init__(self, device: Device, overlap: Stream) -> None:
        self._device, self._overlap = device, overlap
        self._begin = device.new_event(EventType.Main.name)
        self._end = device.new_event(EventType.MoeChunkingOverlap.name)

    def each(self, chunks: Sequence[Chunk], forward: Callable[[Chunk], None]) -> None:
        """Call `forward` for every chunk, in order, on its stream."""
        if len(chunks) == 1:
            forward(chunks[0])
            return
        device, caller = self._device, self._device.current
        device.record(self._begin, caller)
        device.wait(self._overlap, self._begin)
        for chunk in chunks:
            with device.use(caller if chunk.index % 2 else self._overlap):
                forward(chunk)
        device.record(self._end, self._overlap)
        device.wait(caller, self._end)
