"""The cells of all ranks of a node, which each rank reads in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage

from moe_eplb.balancer.weight_sources import Weights
from moe_eplb.core.errors import BalancerError
from moe_eplb.device.sharing import Offer, Sharing

__all__ = ["PeerCells"]


class _Place(NamedTuple):
    """Where a tensor lies in the storages that its rank offers."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


_Places = list[dict[str, _Place]]
"""Of the cells of one layer."""
_Cells = Sequence[Weights]
"""Of one layer on one rank."""


class PeerCells:
    """Offers this rank's cells to the others and opens theirs.

    Args:
        sharing: The device's.
        group: Of the R ranks, for set-up; None for one rank.
        rank: This one.
    """

    def __init__(self, sharing: Sharing, group: dist.ProcessGroup | None, rank: int) -> None:
        self._sharing, self._group, self._rank = sharing, group, rank

    def exchange(self, layers: Sequence[_Cells]) -> list[list[_Cells]]:
        """The cells of each layer on each rank [L][R]. Collective; weights are loaded and stay where they are.

        Raises:
            BalancerError: E205 when another rank's cells cannot be reached, E206 when they differ from this one's.
        """
        mine = self._offered(layers)
        told: list[tuple[list[Offer], list[_Places]]] = [mine]
        if self._group is not None:
            told *= dist.get_world_size(self._group)
            dist.all_gather_object(told, mine, group=self._group)
        for rank, (_, places) in enumerate(told):
            self._require_alike(rank, places, mine[1])
        by_rank = [layers if rank == self._rank else self._opened(*theirs) for rank, theirs in enumerate(told)]
        return [[of_rank[index] for of_rank in by_rank] for index in range(len(layers))]

    def close(self) -> None:
        """Let go of the other ranks' cells; nothing copies from them any more."""
        self._sharing.close()

    def _offered(self, layers: Iterable[_Cells]) -> tuple[list[Offer], list[_Places]]:
        storages: dict[int, tuple[int, UntypedStorage]] = {}

        def place(tensor: Tensor) -> _Place:
            storage = tensor.untyped_storage()
            number, _ = storages.setdefault(storage._cdata, (len(storages), storage))
            return _Place(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

        places = [[{name: place(tensor) for name, tensor in cell.items()} for cell in cells] for cells in layers]
        return [self._sharing.offer(storage) for _, storage in storages.values()], places

    def _opened(self, offers: Sequence[Offer], layers: Sequence[_Places]) -> list[_Cells]:
        storages = [self._sharing.open(offer) for offer in offers]
        return [
            [{name: _tensor(storages[place.storage], place) for name, place in cell.items()} for cell in cells]
            for cells in layers
        ]

    def _require_alike(self, rank: int, theirs: Sequence[_Places], mine: Sequence[_Places]) -> None:
        for layer, (other, own) in enumerate(zip(theirs, mine, strict=True)):
            if _shapes(other) != _shapes(own):
                raise BalancerError(
                    "E206", f"layer {layer}: ranks {self._rank} and {rank} have different cells",
                    why=f"{len(own)} of {_first(own)} here, {len(other)} of {_first(other)} there",
                    hint="give all ranks the same dtype, shapes, slots and spare slots",
                )  # fmt: skip


def _shapes(cells: _Places) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    return [{name: (place.dtype, place.size) for name, place in cell.items()} for cell in cells]


def _first(cells: _Places) -> str:
    shapes = _shapes(cells[:1])
    return ", ".join(f"{name} {dtype} {size}" for one in shapes for name, (dtype, size) in one.items()) or "nothing"


def _tensor(storage: UntypedStorage, place: _Place) -> Tensor:
    empty = torch.empty(0, dtype=place.dtype, device=storage.device)
    return empty.set_(storage, place.offset, place.size, place.stride)
