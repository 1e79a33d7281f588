"""How the updater's thread learns that the device has handed a load over, without looking again and again."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable

from torch import Tensor

__all__ = ["Bell", "CpuBell"]


class Bell(abc.ABC):
    """A counter that the device increases and a thread waits for.

    Args:
        word: int32 [1], host-visible, which the device increases.
    """

    def __init__(self, word: Tensor) -> None:
        self.word = word

    @abc.abstractmethod
    def wait(self, count: int, timeout_s: float) -> bool:
        """Return when the bell was rung `count` times, or after the timeout; whether it was.

        Only for rings that come from work which is enqueued already. The timeout is of a device that is the host; on
        others that work ends by itself, however long it is in coming.
        """

    @abc.abstractmethod
    def tell(self) -> None:
        """The host has changed words that somebody may wait for."""


class CpuBell(Bell):
    """The device is the host: whoever changes a word tells those who wait."""

    def __init__(self, word: Tensor) -> None:
        super().__init__(word)
        self._changed = threading.Condition()

    def wait(self, count: int, timeout_s: float) -> bool:
        return self.wait_for(lambda: int(self.word) >= count, timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Return when the condition holds, or after the timeout; whether it holds."""
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
