"""A file that processes of this node share and that has no name: however they end, nothing of it stays behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import reduction
from typing import Any

__all__ = ["UnnamedFile"]


class UnnamedFile:
    """An empty file in memory. A process that is started with it gets a descriptor of its own, of the same file."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = os.memfd_create("moe_eplb") if descriptor is None else descriptor

    @property
    def path(self) -> str:
        """Opens the file, in this process alone and until `close`."""
        return f"/proc/self/fd/{self._descriptor}"

    def close(self) -> None:
        """Let go of it; it exists for as long as another process does not."""
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Callable[[Any], UnnamedFile], tuple[Any]]:
        return _received, (reduction.DupFd(self._descriptor),)


def _received(duplicate: Any) -> UnnamedFile:
    return UnnamedFile(duplicate.detach())
