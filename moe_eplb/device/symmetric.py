"""Buffers that ranks read from each other in place, and an all-to-all between them whose sizes the device knows alone.

The interface, and its twin on a CPU. Buffers are shared by all layers of a process: exchanges of one group must come
one after the other, in the same order on all ranks, and are never freed, since to free them is a collective, too, and
since graphs hold their addresses.
"""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError

__all__ = ["MOST_RANKS", "HostSymmetric", "Symmetric", "Window", "shared_by_layers"]

MOST_RANKS = 512
"""Threads of the block that exchanges the counts, one a rank."""
NEAR_BLOCKS, FAR_BLOCKS = 64, 16
"""Blocks that copy a large exchange, on one node and over several."""
_WORD, _LOAD = 4, 16


@dataclass(frozen=True, slots=True)
class Window:
    """The buffers of one exchange, C rows of W words.

    Rows received beyond the sum of `received_counts` are what earlier exchanges left there.
    """

    send: Tensor
    """int32 [C, W]: rows for rank 0 first, then those for rank 1, and so on, without gaps."""
    send_counts: Tensor
    """int64 [R]: rows for each rank."""
    received: Tensor
    """int32 [C, W]: rows of rank 0 first, and so on."""
    counts_and_offsets: Tensor
    """int64 [2, R]: rows of each rank, and where they begin."""

    @property
    def received_counts(self) -> Tensor:
        """int64 [R]: rows of each rank; peers overwrite them once the exchange after the next has begun."""
        return self.counts_and_offsets[0]


class Symmetric(abc.ABC):
    """Windows over the ranks of one group.

    Args:
        group: The ranks. All of them ask for the same windows and exchange in the same order.
        device: Where the buffers are.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.ranks, self._device = group, group.size(), device
        self._windows: dict[tuple[str, int], list[Window]] = {}
        self._last: Window | None = None
        self.align = _row_align(self.ranks)

    def window(self, purpose: str, rows: int, words: int) -> Window:
        """The window of that purpose with at least that many rows, made if there is none, which is a collective.

        Args:
            purpose: Windows of different purposes share no memory.
            rows: The same on all ranks.
            words: W, a multiple of `align`.

        Raises:
            BalancerError: E212 when it had to be made while a graph is captured.
        """
        made = self._windows.setdefault((purpose, words), [])
        if not made or len(made[-1].send) < rows:
            self._check_capture(rows)
            made.append(self._make(1 << max(rows - 1, 0).bit_length(), words))
        return made[-1]

    def exchange(self, window: Window) -> None:
        """Send the rows of `window.send` to their ranks.

        What was sent may be read by peers until the next exchange, through another window, is over.
        """
        if window is self._last:  # a forward broke off between its two exchanges
            self._exchange(self.window("pause", 1, self.align))
        self._last = window
        self._exchange(window)

    def _make(self, rows: int, words: int) -> Window:
        with torch.inference_mode(False):  # they are written in any mode
            send, received = (self._empty((rows, words), torch.int32).zero_() for _ in range(2))
            send_counts = self._empty((self.ranks,), torch.int64).zero_()
            # Not zeroed: a peer that is ahead may have written its count by the time this device came to it.
            return Window(send, send_counts, received, self._empty((2, self.ranks), torch.int64))

    def _check_capture(self, rows: int) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BalancerError(
                "E212", f"symmetric buffers for {rows} rows were needed while a graph is captured",
                why="to make them is a collective, for which the host waits",
                hint="run a forward of as many tokens before the capture",
            )  # fmt: skip

    @abc.abstractmethod
    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A buffer that peers can reach; a collective."""

    @abc.abstractmethod
    def _exchange(self, window: Window) -> None: ...


class HostSymmetric(Symmetric):
    """On a CPU: the host reads the counts and sends the rows with two collectives of torch.distributed."""

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def _exchange(self, window: Window) -> None:
        counts = torch.empty(self.ranks, dtype=torch.int64)
        dist.all_to_all_single(counts, window.send_counts, group=self.group)
        send, receive = window.send_counts.tolist(), counts.tolist()
        sent, received = window.send[: sum(send)], window.received[: sum(receive)]
        dist.all_to_all_single(received, sent, receive, send, group=self.group)
        window.counts_and_offsets[0] = counts
        window.counts_and_offsets[1] = counts.cumsum(0) - counts


_SHARED: dict[tuple[str, str], Symmetric] = {}


def shared_by_layers(
    make: Callable[[dist.ProcessGroup, torch.device], Symmetric], group: dist.ProcessGroup, device: torch.device
) -> Symmetric:
    """The one `Symmetric` of this process for the group.

    Raises:
        BalancerError: E211 for more ranks than one exchange takes.
    """
    if group.size() > MOST_RANKS:
        raise BalancerError(
            "E211", f"dispatch 'symm_mem' cannot join {group.size()} ranks",
            why=f"one exchange takes at most {MOST_RANKS}", hint="use dispatch 'alltoall' or 'allgather'",
        )  # fmt: skip
    key = (str(device), group.group_name)
    found = _SHARED.get(key)
    if found is None or found.group is not group:  # a name may come again after the groups were destroyed
        found = _SHARED[key] = make(group, device)
    return found


def _row_align(ranks: int) -> int:
    """Words of which a row is a multiple, on every device.

    On a GPU each peer's rows are shared out among blocks that copy equal numbers of bytes, without a remainder, best
    16 at a time. How many rows there are nobody knows before, so one row must divide.
    """
    blocks = [NEAR_BLOCKS, FAR_BLOCKS]
    if asked := os.environ.get("TORCH_SYMMMEM_NBLOCKS"):
        blocks.append(int(asked))
    return _LOAD // _WORD * math.lcm(*(max(count // ranks, 1) for count in blocks))
