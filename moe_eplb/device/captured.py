"""Work that was captured into a graph: what runs when it is replayed."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

__all__ = ["Captured"]

T = TypeVar("T")


class Captured(abc.ABC, Generic[T]):
    """A graph of what was enqueued on all streams.

    Attributes:
        result: What the captured work returned: memory that each replay fills anew.
    """

    result: T

    @abc.abstractmethod
    def replay(self) -> T:
        """Enqueue the graph on the current stream."""
