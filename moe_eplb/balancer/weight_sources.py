"""Where the weights of an expert come from that moves into a slot: the host's copy, or a slot that holds it already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from moe_eplb.balancer.cells import CellView
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.core.placement import Placement

__all__ = ["HOST", "OWN", "PEER", "FromHost", "FromPeers", "WeightSource", "Weights", "source_slots"]

HOST, OWN, PEER = "host", "own", "peer"
"""A source: the host, another cell of the same rank, a cell of another rank."""

Weights = Mapping[str, Tensor]
"""One expert's, by weight name."""


class WeightSource(Protocol):
    """Finds the weights of experts for one rank.

    Attributes:
        follows: The ranks whose cells it must be told.
    """

    follows: range

    def of(self, live: CellView, experts: np.ndarray) -> list[tuple[str, Weights]]:
        """Kind of source and weights of each of `experts` [n], given what is live."""


class FromHost:
    """All from the host's copies."""

    def __init__(self, host: HostMoeTensorSharer, rank: int) -> None:
        self._host = host
        self.follows = range(rank, rank + 1)

    def of(self, live: CellView, experts: np.ndarray) -> list[tuple[str, Weights]]:
        names = sorted(self._host.names)
        return [(HOST, {name: self._host.host_tensor(e, name) for name in names}) for e in experts.tolist()]


class FromPeers:
    """All from cells that are live under the committed placement, on this rank or another.

    No such cell is overwritten while it is read, with no further agreement: a plan is committed when every rank has
    voted, which each does behind its copies; until then what is live stays live, and only a plan after that can give
    the cell to another expert. The copies of a plan that was dropped lie before those of the next one on the same
    stream, and so before the next vote.

    Args:
        cells: Of each rank [R], its cells by weight name.
        rank: This one.
    """

    def __init__(self, cells: Sequence[Sequence[Weights]], rank: int) -> None:
        self._cells, self._rank = cells, rank
        self.follows = range(len(cells))

    def of(self, live: CellView, experts: np.ndarray) -> list[tuple[str, Weights]]:
        ranks, local = np.divmod(source_slots(live.placement, experts, self._rank), live.placement.slots_per_rank)
        cells = live.cells[ranks, local]
        return [
            (OWN if rank == self._rank else PEER, self._cells[rank][cell])
            for rank, cell in zip(ranks.tolist(), cells.tolist(), strict=True)
        ]


def source_slots(placement: Placement, experts: np.ndarray, rank: int) -> np.ndarray:
    """A slot [n] that holds each of `experts` [n]: one of the rank's own, else another for each rank that asks."""
    mine = placement.rank_slots(rank)
    own = np.full(placement.experts, -1, np.int64)
    own[placement.slot_to_expert[mine]] = np.arange(mine.start, mine.stop)
    turn = rank % placement.replica_count[experts]
    others = placement.slot_ids[placement.start_offset[experts] + turn]
    found: np.ndarray = np.where(own[experts] >= 0, own[experts], others)
    return found
