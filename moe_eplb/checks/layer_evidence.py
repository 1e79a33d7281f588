"""What one layer did in one iteration, over all its forwards and their chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_eplb.checks.equality import Difference
from moe_eplb.checks.exactly_once import DispatchEvidence, tally

__all__ = ["LayerEvidence", "OutputEvidence"]


@dataclass(slots=True)
class OutputEvidence:
    """The worst difference of outputs, how many tokens were compared, and how many the router sent elsewhere."""

    worst: Difference = field(default_factory=lambda: Difference(0.0, 0.0, 0.0))
    tokens: int = 0
    misrouted: int = 0

    def add(self, difference: Difference, tokens: int, misrouted: int = 0) -> None:
        """One more output of that many tokens; of two ratios that are not a number the first stays."""
        self.tokens += tokens
        self.misrouted += misrouted
        if not difference.ratio <= self.worst.ratio:
            self.worst = difference


@dataclass(slots=True)
class LayerEvidence:
    """Collected while the layer runs, written down when the iteration ends.

    `ids`: expert ids [T, K] of each chunk. `processed`: rows int64 (source rank, chunk, token, k, slot, found expert).
    `routed_reference`: what the routed experts of the last forward should have given [T, D].
    """

    ids: list[Tensor] = field(default_factory=list)
    expected: np.ndarray | None = None
    processed: list[Tensor] = field(default_factory=list)
    routed_output: OutputEvidence = field(default_factory=OutputEvidence)
    shared_output: OutputEvidence = field(default_factory=OutputEvidence)
    block_output: OutputEvidence = field(default_factory=OutputEvidence)
    routed_reference: Tensor | None = None

    def add_routed(self, ids: Tensor, expected: np.ndarray) -> None:
        """A chunk was routed; `expected` [P] entries by slot follow from the replica rule."""
        self.ids.append(ids)
        self.expected = expected if self.expected is None else self.expected + expected

    def add_processed(self, source_rank: Tensor, token: Tensor, k: Tensor, slot: Tensor, found: Tensor) -> None:
        """This rank computes entries of the chunk that was routed last: all ranks go through the chunks in step."""
        chunk = torch.full_like(slot, len(self.ids) - 1)
        self.processed.append(torch.stack([t.long() for t in (source_rank, chunk, token, k, slot, found)], dim=1))

    def rows(self) -> Tensor:
        """All processed rows int64 [N, 6]."""
        return torch.cat(self.processed) if self.processed else torch.empty(0, 6, dtype=torch.int64)

    def counts(self, experts: int) -> np.ndarray:
        """Entries per expert int64 [E] of this rank's ids; those outside [0, E) are nobody's."""
        ids = torch.cat([chunk.flatten() for chunk in self.ids]).numpy()
        counts: np.ndarray = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
        return counts

    def dispatch(self, arrived: Tensor, *, slots: int) -> DispatchEvidence:
        """What all ranks processed of this rank's tokens: rows int64 (chunk, token, k, slot, found expert)."""
        sizes = torch.tensor([chunk.shape[0] for chunk in self.ids])
        starts = sizes.cumsum(0) - sizes
        chunk, token = arrived[:, 0], arrived[:, 1]
        known = (chunk >= 0) & (chunk < len(sizes))
        where = torch.where(known, chunk, 0)
        inside = known & (token >= 0) & (token < sizes[where])
        position = torch.where(inside, token + starts[where], -1)
        return tally(torch.cat(self.ids), torch.cat([position.unsqueeze(1), arrived[:, 2:]], dim=1), slots=slots)
