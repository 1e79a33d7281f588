"""Copies to the device that the updater's thread makes again and again, beside the model's streams."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Copier", "CopierAtOnce"]


class Copier(abc.ABC):
    """Enqueues copies; those of all copiers of a device are done in the order in which they were enqueued."""

    @abc.abstractmethod
    def enqueue(self, copies: Sequence[tuple[Tensor, Tensor]], words: Sequence[tuple[Tensor, int]] = ()) -> None:
        """Copy (target, source) pairs in order, and then set words.

        Args:
            copies: Source and target of a pair are contiguous and have the same bytes.
            words: int64 [1] each, with what it is to hold; in order, each behind all copies.
        """

    @abc.abstractmethod
    def wait(self) -> bool:
        """Return when all that was enqueued here is done; whether that took a wait."""


class CopierAtOnce(Copier):
    """Where the device is the host."""

    def enqueue(self, copies: Sequence[tuple[Tensor, Tensor]], words: Sequence[tuple[Tensor, int]] = ()) -> None:
        with torch.inference_mode():
            for target, source in copies:
                target.copy_(source)
            for word, value in words:
                word.fill_(value)

    def wait(self) -> bool:
        return False
