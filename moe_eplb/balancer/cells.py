"""Weights that move by writing into a free cell: nothing that a kernel may be reading is ever overwritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement

__all__ = ["CellView", "CellWeights", "assign_cells", "require_in_order"]


@dataclass(frozen=True, slots=True)
class CellView:
    """Where experts and cells are, as the updater's thread knows it.

    Attributes:
        placement: Of the layer.
        cells: int32 [G, S], the cell of each slot of the G ranks that are followed.
        due: The iteration of the plan, -1 at the start.
    """

    placement: Placement
    cells: np.ndarray
    due: int = -1


def assign_cells(current: np.ndarray, changed: np.ndarray, cells: int, *, layer: int, first_rank: int) -> np.ndarray:
    """int32 [G, S], the cells after new contents of some slots, for each of which a free cell of its rank is taken.

    Every rank that does this for the same plans knows the cells of all ranks without being told.

    Args:
        current: int32 [G, S], the cells that are live on G ranks.
        changed: Slots [n] whose expert changes, ascending, numbered through the G ranks.
        cells: S + X, how many cells each rank has.
        layer, first_rank: What an error names.

    Raises:
        BalancerError: E172 when a rank has not enough free cells.
    """
    ranks, slots = current.shape
    rank, slot = np.divmod(changed, slots)
    most = np.bincount(rank, minlength=ranks)
    if len(changed) and most.max() > cells - slots:
        worst = int(most.argmax())
        raise BalancerError(
            "E172", f"layer {layer}: {most[worst]} slots of rank {first_rank + worst} change at once",
            why=f"{cells - slots} of {cells} cells are free",
            hint="raise spare_slots, or limit the changes of a plan to it",
        )  # fmt: skip
    used = np.zeros((ranks, cells), np.bool_)
    used[np.arange(ranks)[:, None], current] = True
    free = np.argsort(used, axis=1, kind="stable")  # the free ones first, in order
    after = current.copy()
    begins = np.cumsum(most) - most
    after[rank, slot] = free[rank, np.arange(len(changed)) - begins[rank]]
    return after


class CellWeights:
    """The S + X cells of one layer on this rank, in which its S slots live.

    Args:
        table: int32 [S] on the device, the live cell of each slot, which the kernels read; slot s lives in cell s at
            first.
        cells: For each cell, its tensors by weight name.
    """

    def __init__(self, table: Tensor, cells: Sequence[Mapping[str, Tensor]]) -> None:
        self.table, self.cells = table, cells

    def write(
        self, slot: int, cell: int, source: Mapping[str, Tensor], staged: StagedWeights
    ) -> list[tuple[Tensor, Tensor]]:
        """The copies (target, source) that bring an expert's weights, which a local slot shall hold, to a cell."""
        copies = [(target, source[name]) for name, target in self.cells[cell].items()]
        staged.tensors += [(slot, name, target) for name, target in self.cells[cell].items()]
        staged.bytes += sum(target.nbytes for target, _ in copies)
        return copies


def require_in_order(cells: CellWeights | None, slots: int, layer: int) -> CellWeights:
    """The cells that a model has told of a layer; raises BalancerError E137 unless it has, with each of the `slots` in
    the cell of its number."""
    if cells is None:
        raise BalancerError(
            "E137", f"layer {layer}: no cells were registered", why="its weights could not be moved",
            hint="call register_weight_cells before finalize_model",
        )  # fmt: skip
    table = cells.table.tolist()
    if table != list(range(slots)):
        raise BalancerError(
            "E137", f"layer {layer}: slots do not live in the cells of their numbers at first", why=f"cells {table}",
            hint="register a table that counts from 0",
        )  # fmt: skip
    return cells
