"""Buffers that ranks reach into, and an all-to-all of equal blocks between them.

The interface, and its twin on a CPU. Buffers are shared by all layers of a process: exchanges of one group must come
one after the other, in the same order on all ranks, and are never freed, since to free them is a collective, too, and
since graphs hold their addresses.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError

__all__ = ["HostSymmetric", "Symmetric", "Window", "shared_by_layers"]

_MOST_BYTES = 2**31 - 1
_WORD = 4
_LEAST_WORDS = 4
"""Of a row, which then begins and ends at a multiple of 16 bytes."""


@dataclass(frozen=True, slots=True)
class Window:
    """The buffers of one exchange, int32 [C, W]; what is in them at first is anything.

    An exchange takes R equal blocks of rows from the front of either.
    """

    send: Tensor
    """Block r goes to rank r."""
    received: Tensor
    """Block s is of rank s."""


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

    def window(self, purpose: str, rows: int, words: int) -> Window:
        """The window of that purpose with at least that many rows, made if there is none, which is a collective.

        Args:
            purpose: Windows of different purposes share no memory.
            rows: The same on all ranks.
            words: W, a multiple of 4.

        Raises:
            BalancerError: E212 when it had to be made while a graph is captured, E213 when it is too large.
        """
        _require_small(rows, words)
        made = self._windows.setdefault((purpose, words), [])
        if not made or len(made[-1].send) < rows:
            self._check_capture(rows)
            # By powers of two, so that few are made; the next one may be more than there can be.
            most = _MOST_BYTES // (_WORD * words)
            made.append(self._make(min(1 << max(rows - 1, 0).bit_length(), most), words))
        return made[-1]

    def exchange(self, window: Window, rows: int) -> None:
        """Send the first `rows` rows, a multiple of R and the same on all ranks.

        Behind it, on the stream, all that peers sent is there and `window.send` may be written. A peer may begin the
        next exchange before this rank has read what it received, though not the one after that, for which it needs
        this rank's rows of the next. So two windows that take turns are enough: a peer writes here again only when this
        rank, behind its reading, has entered the exchange of the other window.
        """
        if not rows:
            return
        if window is self._last:  # a forward broke off between its two exchanges
            self._send(self.window("pause", self.ranks, _LEAST_WORDS), self.ranks)
        self._last = window
        self._send(window, rows)

    def _send(self, window: Window, rows: int) -> None:
        self._exchange(window.send[:rows], window.received[:rows])

    def _make(self, rows: int, words: int) -> Window:
        with torch.inference_mode(False):  # they are written in any mode
            # Not zeroed: a peer that is ahead may have sent by the time this device came to it.
            return Window(self._empty((rows, words)), self._empty((rows, words)))

    def _check_capture(self, rows: int) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise BalancerError(
                "E212", f"symmetric buffers for {rows} rows were needed while a graph is captured",
                why="to make them is a collective, for which the host waits",
                hint="run a forward of as many tokens before the capture",
            )  # fmt: skip

    @abc.abstractmethod
    def _empty(self, shape: tuple[int, int]) -> Tensor:
        """An int32 buffer that peers can reach; a collective."""

    @abc.abstractmethod
    def _exchange(self, send: Tensor, received: Tensor) -> None: ...


class HostSymmetric(Symmetric):
    """On a CPU: a collective of torch.distributed between buffers that stay."""

    def _empty(self, shape: tuple[int, int]) -> Tensor:
        return torch.empty(shape, dtype=torch.int32)

    def _exchange(self, send: Tensor, received: Tensor) -> None:
        dist.all_to_all_single(received, send, group=self.group)


def _require_small(rows: int, words: int) -> None:
    """NVSHMEM counts the bytes of a buffer as an int of 32 bits on the device."""
    size = rows * words * _WORD
    if size > _MOST_BYTES:
        raise BalancerError(
            "E213", f"{rows} rows of {_WORD * words} bytes are too many for dispatch 'symm_mem'",
            why=f"{size} bytes in one exchange, {_MOST_BYTES} are the most",
            hint="give forwards fewer tokens, or use dispatch: alltoall",
        )  # fmt: skip


_SHARED: dict[tuple[str, str], Symmetric] = {}


def shared_by_layers(
    make: Callable[[dist.ProcessGroup, torch.device], Symmetric], group: dist.ProcessGroup, device: torch.device
) -> Symmetric:
    """The one `Symmetric` of this process for the group."""
    key = (str(device), group.group_name)
    found = _SHARED.get(key)
    if found is None or found.group is not group:  # a name may come again after the groups were destroyed
        found = _SHARED[key] = make(group, device)
    return found
