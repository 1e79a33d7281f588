"""What the balancer keeps on the device, so that no forward waits for the host, and what the host can read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "LANES",
    "REPORT",
    "HostVisible",
    "LayerState",
    "ModelState",
    "Outcome",
    "Report",
    "Stage",
    "nothing_counted",
]

HostVisible = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes zeros that host and device share."""
LANES = 5
"""Integers of a vote, see `moe_eplb.balancer.agreement`."""


class Report(IntEnum):
    """Columns of a layer's report on the plan that is due in an iteration."""

    DUE = 0
    READY_HERE = 1
    WAITED_NS = 2
    READY_RANKS = 3
    DIGESTS_DIFFER = 4
    OUTCOME = 5
    OUTCOME_ITERATION = 6
    VOTED = 7


REPORT = len(Report)


class Outcome(IntEnum):
    """What became of a plan."""

    NONE = 0
    COMMITTED = 1
    DROPPED = 2


class Stage(IntEnum):
    """Stages of a layer of which the device itself writes down the iteration in which it did them."""

    TAKE_OVER = 0
    VOTE = 1
    FOLD = 2
    HAND_OVER = 3


@dataclass(slots=True)
class ModelState:
    """State of all L layers. Tensors are on the device, except those that the host reads while the device works.

    Attributes:
        turns: int64 [N, 2 + L], host-visible: the rows of the iterations to come and of the last ones, by iteration
            modulo N. A row is the iteration, whether it counts, and for each layer whether it hands its load over.
        turn: int64 [2 + L], the row of the iteration under way, which the first layer takes; before, its iteration
            is -1.
        coming: int64 [2 + L], the row of the iteration that comes, where the device has looked for it and found it; or
            an older one, at first that of iteration -1.
        begun: int64 [1], host-visible, the iteration that the first layer has begun last, -1 for none.
        due: int64 [L], the iteration in which a layer's plan is to be committed, -1 without one.
        decision: int64 [L], the vote on that plan: -1 not yet, 0 no, 1 agreed.
        ready: int64 [L], `due` of the newest plan of a layer that is prepared, written by whoever prepares it.
        overdue: int64 [1], set when a wait was in vain; until the next plan is ready nobody waits again.
        rung: int32 [1], how often the bell was rung.
        stages: int64 [L, 4], see `Stage`.
        bell: int32 [1], host-visible copy of `rung`, written last.
        committed: int64 [L], host-visible, `due` of the last plan of a layer that was committed, -1 for none.
        reports: int64 [N, L, REPORT], host-visible, by iteration modulo N: those of the last N iterations.
        overflow: int64 [L], host-visible: one more than the iteration in which a count went beyond int32, 0 for none.
    """

    turns: Tensor
    turn: Tensor
    coming: Tensor
    begun: Tensor
    due: Tensor
    decision: Tensor
    ready: Tensor
    overdue: Tensor
    rung: Tensor
    stages: Tensor
    bell: Tensor
    committed: Tensor
    reports: Tensor
    overflow: Tensor

    @staticmethod
    def make(layers: int, device: torch.device, host_visible: HostVisible, kept: int = 8) -> ModelState:
        """State of a model that has not begun, with rows of and reports on that many iterations."""
        long = torch.int64
        none = [torch.full((layers,), -1, dtype=long, device=device) for _ in range(3)]
        turn = torch.zeros(2 + layers, dtype=long, device=device)
        turn[0] = -1
        return ModelState(
            turns=host_visible((kept, 2 + layers), long).fill_(-1), turn=turn, coming=turn.clone(),
            begun=host_visible((1,), long).fill_(-1),
            due=none[0], decision=none[1], ready=none[2],
            overdue=torch.zeros(1, dtype=long, device=device),
            rung=torch.zeros(1, dtype=torch.int32, device=device),
            stages=torch.full((layers, len(Stage)), -1, dtype=long, device=device),
            bell=host_visible((1,), torch.int32).zero_(),
            committed=host_visible((layers,), long).fill_(-1),
            reports=host_visible((kept, layers, REPORT), long).fill_(-1),
            overflow=host_visible((layers,), long).zero_(),
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """L."""
        return self.due.numel()

    def row(self, iteration: int) -> Tensor:
        """int64 [2 + L], where the row of an iteration is."""
        return self.turns[iteration % self.turns.shape[0]]

    def report(self, layer: int, due: int) -> Tensor:
        """int64 [REPORT], the report on the plan of a layer that is due in that iteration."""
        return self.reports[due % self.reports.shape[0], layer]


@dataclass(slots=True)
class LayerState:
    """State of one layer with E experts, P slots and S slots a rank.

    Attributes:
        layer: Index of the layer.
        tables: int32 [2E + P], the live route tables, see `moe_eplb.balancer.replica_choice.RouteTables`.
        cells: int32 [S], the live cell of each local slot.
        pending: int32 [2E + P + S], what tables and cells become when the plan is committed.
        lanes: int64 [LANES], this rank's vote for that plan.
        counts: int32 [E], tokens of this rank in this iteration.
        message: int64 [E + LANES], counts and the next layer's lanes, as they are summed over ranks.
        load: float32 [E], see `moe_eplb.balancer.statistics.LoadWindow`.
        recent: int64 [W, E], the counts of the last iterations.
        folded: int64 [1], how many iterations were folded in.
        reduced: int64 [E], the counts of all ranks in the last iteration that was folded in.
        handed: int64 [1], host-visible, the iteration in which the load was handed over last.
        handed_load: float32 [E], host-visible, that load.
    """

    layer: int
    tables: Tensor
    cells: Tensor
    pending: Tensor
    lanes: Tensor
    counts: Tensor
    message: Tensor
    load: Tensor
    recent: Tensor
    folded: Tensor
    reduced: Tensor
    handed: Tensor
    handed_load: Tensor

    @staticmethod
    def make(
        layer: int,
        experts: int,
        tables: Tensor,
        cells: Tensor,
        window: int,
        host_visible: HostVisible,
    ) -> LayerState:
        """State of a layer that has counted nothing; `tables` and `cells` are the live ones."""
        pending = torch.zeros(tables.numel() + cells.numel(), dtype=torch.int32, device=tables.device)
        counted = nothing_counted((), experts, window, tables.device, host_visible)
        return LayerState(layer=layer, tables=tables, cells=cells, pending=pending, **counted)

    @property
    def experts(self) -> int:
        """E."""
        return self.counts.numel()

    def forget(self) -> None:
        """Drop all counts."""
        for tensor in (self.counts, self.load, self.recent, self.folded):
            tensor.zero_()


def nothing_counted(
    rows: tuple[int, ...], experts: int, window: int, device: torch.device, host_visible: HostVisible
) -> dict[str, Tensor]:
    """The tensors of `LayerState` that counts, votes and loads go through, with `rows` in front of their shapes."""
    long, each = torch.int64, rows or (1,)
    return {
        "counts": torch.zeros(*rows, experts, dtype=torch.int32, device=device),
        "lanes": torch.zeros(*rows, LANES, dtype=long, device=device),
        "message": torch.zeros(*rows, experts + LANES, dtype=long, device=device),
        "load": torch.zeros(*rows, experts, dtype=torch.float32, device=device),
        "recent": torch.zeros(*rows, window, experts, dtype=long, device=device),
        "folded": torch.zeros(each, dtype=long, device=device),
        "reduced": torch.zeros(*rows, experts, dtype=long, device=device),
        "handed": host_visible(each, long).fill_(-1),
        "handed_load": host_visible((*rows, experts), torch.float32).zero_(),
    }
