"""Weights that move by writing into a free cell: nothing that a kernel may be reading is ever overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.core.errors import BalancerError

__all__ = ["CellWeights"]


class CellWeights:
    """The S + X cells of one layer on this rank, in which its S slots live.

    Args:
        layer: Index of the layer.
        table: int32 [S] on the device, the live cell of each slot, which the kernels read.
        cells: For each cell, its tensors by weight name.
    """

    def __init__(self, layer: int, table: Tensor, cells: Sequence[Mapping[str, Tensor]]) -> None:
        self._layer, self.table, self._cells = layer, table, cells

    def choose(self, current: np.ndarray, local_slots: Sequence[int]) -> np.ndarray:
        """int32 [S], the cells after new contents of `local_slots`, for each of which a free cell is taken.

        Args:
            current: int32 [S], the cells that are live.
            local_slots: Slots whose expert changes.

        Raises:
            BalancerError: E172 when there are not enough free cells.
        """
        free = sorted(set(range(len(self._cells))) - set(current.tolist()))
        if len(free) < len(local_slots):
            raise BalancerError(
                "E172", f"layer {self._layer}: {len(local_slots)} slots of this rank change at once",
                why=f"{len(free)} of {len(self._cells)} cells are free",
                hint="raise spare_slots, or limit the changes of a plan to it",
            )  # fmt: skip
        cells = current.copy()
        cells[list(local_slots)] = free[: len(local_slots)]
        return cells

    def write(self, slot: int, cell: int, expert: int, host: HostMoeTensorSharer, staged: StagedWeights) -> None:
        """Copy an expert, which a local slot shall hold, from the host into a free cell."""
        for name, target in self._cells[cell].items():
            target.copy_(host.host_tensor(expert, name), non_blocking=True)
            staged.tensors.append((slot, name, target))
            staged.bytes += target.numel() * target.element_size()
