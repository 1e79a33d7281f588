"""Memory of one rank that other ranks of the node read in place: the interface, and shared host memory behind it."""

from __future__ import annotations

import abc
import os
from dataclasses import dataclass, field
from typing import cast

from torch import UntypedStorage

from moe_eplb.core.errors import BalancerError

__all__ = ["Offer", "SharedHostMemory", "Sharing", "cannot_open"]


@dataclass(frozen=True, slots=True)
class Offer:
    """Tells another process of this node where a storage is.

    Args:
        pid: The process that offers it.
        where: What the device needs to find the memory in which the storage lies.
        offset, size: The storage in that memory, bytes.
        card: Which GPU holds it, where one does.
    """

    pid: int
    where: bytes
    size: int
    offset: int = 0
    card: str = ""


class Sharing(abc.ABC):
    """Offers storages to other processes and opens theirs. Who offers one keeps it for as long as others use it."""

    @abc.abstractmethod
    def offer(self, storage: UntypedStorage) -> Offer:
        """Let other processes read the storage; tensors in it stay valid, and may get another address on a CPU."""

    @abc.abstractmethod
    def open(self, offer: Offer) -> UntypedStorage:
        """The storage that another process offers.

        Raises:
            BalancerError: E205 when it cannot be reached from here.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what was opened; nothing reads it any more."""


@dataclass(slots=True)
class SharedHostMemory(Sharing):
    """Of processes of one user on one machine. The memory has no name that could outlive its processes."""

    _opened: list[UntypedStorage] = field(default_factory=list)

    def offer(self, storage: UntypedStorage) -> Offer:
        storage.share_memory_()
        descriptor, size = storage._share_fd_cpu_()  # which stays the storage's own
        return Offer(os.getpid(), str(descriptor).encode(), size)

    def open(self, offer: Offer) -> UntypedStorage:
        path = f"/proc/{offer.pid}/fd/{offer.where.decode()}"
        try:
            storage = cast(UntypedStorage, UntypedStorage.from_file(path, True, offer.size))
        except RuntimeError as error:
            raise cannot_open(offer, str(error)) from error
        self._opened.append(storage)
        return storage

    def close(self) -> None:
        self._opened.clear()


def cannot_open(offer: Offer, why: str) -> BalancerError:
    """Peers were asked for and are not there."""
    return BalancerError(
        "E205", f"the expert weights of process {offer.pid} cannot be read from here", why=why,
        hint="ranks must share one node, one user and one process namespace, and GPUs must reach each other "
        "(nvidia-smi topo -p2p r); or move weights from the host with balancer.weights_from: host",
    )  # fmt: skip
