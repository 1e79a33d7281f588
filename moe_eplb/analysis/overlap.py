"""How much of the balancer's and of the communication's work is hidden behind the model's own work.

With U() the length of a union: hidden(B, C) = U(B and C), exposed = U(B) - hidden, overlap = hidden / U(B), which is
null when U(B) is 0. Waiting is not work: waits hide nothing and are hidden by nothing. Times never cross ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import intervals
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.intervals import Intervals
from moe_eplb.analysis.trace import Records
from moe_eplb.analysis.work import Work, work_of_records
from moe_eplb.core.events import Role

__all__ = ["PAIRS", "Hidden", "Overlap", "Pair", "measure"]

_WORK = (Role.EPLB_STATISTIC, Role.EPLB_ALLREDUCE, Role.EPLB_SIGNAL, Role.EPLB_MIGRATE)
_MAIN_WORK = (Role.COMPUTE, Role.COMM)


@dataclass(frozen=True, slots=True)
class Pair:
    """What is to be hidden (roles of B) behind what (roles of C)."""

    hidden: tuple[Role, ...]
    behind: tuple[Role, ...]
    other_streams: bool = False
    """C is the work of all streams but that of B, instead of the main stream's."""
    updater: bool = False
    """B includes the updater thread's work."""


PAIRS: dict[str, Pair] = {
    "balancer": Pair(_WORK, _MAIN_WORK),
    "balancer_compute": Pair(_WORK, (Role.COMPUTE,)),
    "communication": Pair((Role.COMM,), (Role.COMPUTE,), other_streams=True),
    "communication_waits": Pair((Role.COMM, Role.COMM_WAIT), (Role.COMPUTE,), other_streams=True),
    "statistic": Pair((Role.EPLB_STATISTIC,), _MAIN_WORK),
    "reduction": Pair((Role.EPLB_ALLREDUCE,), _MAIN_WORK),
    "handover": Pair((Role.EPLB_SIGNAL,), _MAIN_WORK),
    "migration": Pair((Role.EPLB_MIGRATE,), _MAIN_WORK, updater=True),
}
"""The three named pairs (communication in two forms), then each kind of balancer work for itself."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Lengths in ns of one B: all of it, and what of it is hidden."""

    total: int = 0
    hidden: int = 0

    @property
    def exposed(self) -> int:
        """What nothing hides."""
        return self.total - self.hidden

    @property
    def overlap(self) -> float | None:
        """The hidden share; None when there is nothing to hide."""
        return self.hidden / self.total if self.total else None

    def __add__(self, other: Hidden) -> Hidden:
        return Hidden(self.total + other.total, self.hidden + other.hidden)


@dataclass(frozen=True)
class Overlap:
    """One pair, measured exactly for each (rank, iteration, layer) that has work of B."""

    cells: dict[tuple[int, ...], Hidden]
    ranks: dict[int, Hidden]
    iterations: dict[tuple[int, ...], Hidden]
    """By (rank, iteration); the union over layers, not their sum."""
    streams: dict[tuple[int, ...], Hidden]
    """By (rank, stream of B)."""

    @property
    def whole(self) -> Hidden:
        """The run: the sum over ranks."""
        return sum(self.ranks.values(), Hidden())

    def by_iteration(self) -> dict[int, Hidden]:
        """The sum over ranks for each iteration."""
        return _summed(self.iterations, 1)

    def by_layer(self) -> dict[int, Hidden]:
        """The sum over ranks and iterations for each layer."""
        return _summed(self.cells, 2)

    def worst_exposed(self) -> list[int]:
        """For each iteration the exposed ns of the rank where most is exposed."""
        worst: dict[int, int] = {}
        for (_, iteration), hidden in self.iterations.items():
            worst[iteration] = max(worst.get(iteration, 0), hidden.exposed)
        return [worst[iteration] for iteration in sorted(worst)]


def measure(source: Records | Work, pair: Pair, only: NDArray[np.bool_] | None = None) -> Overlap:
    """Measure a pair on all finished device work (and the updater's, where the pair includes it).

    Where graph replays were traced as a whole nobody knows what they hid, so that nothing is measured on their GPU.

    Args:
        only: Mask [N] of what may be B; what hides it is always taken from everything.
    """
    whole = work_of_records(source) if isinstance(source, Records) else source
    wanted = whole.of(*pair.hidden) & ~whole.unseen
    wanted = wanted if only is None else wanted & only
    work = whole.where(wanted if pair.updater else wanted & ~whole.updater)
    behind = whole.where(whole.of(*pair.behind) & ~whole.updater)
    pairs = work.within(whole)
    pieces, owner = _covered(work, pairs, behind, behind.within(whole), pair.other_streams)

    def by(*keys: NDArray[np.int64]) -> dict[tuple[int, ...], Hidden]:
        return _grouped(keys, pairs, pieces, owner)

    return Overlap(
        cells=by(work.rank, work.iteration, work.layer),
        ranks={rank: hidden for (rank,), hidden in by(work.rank).items()},
        iterations=by(work.rank, work.iteration),
        streams=by(work.rank, work.stream),
    )


def _covered(
    work: Work, pairs: Intervals, behind: Work, behind_pairs: Intervals, other_streams: bool
) -> tuple[Intervals, NDArray[np.int64]]:
    """The pieces of B that C covers, and the index into B of each."""
    if not other_streams:
        return intervals.clip(pairs, intervals.union(behind_pairs[behind.main]))
    # Only for streams that have work of both kinds does C differ from that of all streams together.
    shared = np.intersect1d(work.stream, behind.stream)
    covers = {stream: behind_pairs[behind.stream != stream] for stream in shared.tolist()}
    parts = [(np.flatnonzero(~np.isin(work.stream, shared)), behind_pairs)]
    parts += [(np.flatnonzero(work.stream == stream), cover) for stream, cover in covers.items()]
    pieces, owners = [intervals.EMPTY], [np.empty(0, dtype=np.int64)]
    for index, cover in parts:
        piece, owner = intervals.clip(pairs[index], intervals.union(cover))
        pieces.append(piece)
        owners.append(index[owner])
    return np.concatenate(pieces), np.concatenate(owners)


def _grouped(
    keys: tuple[NDArray[np.int64], ...], pairs: Intervals, pieces: Intervals, owner: NDArray[np.int64]
) -> dict[tuple[int, ...], Hidden]:
    names, group = distinct_rows(keys)
    totals = intervals.grouped_length(pairs, group, len(names))
    hidden = intervals.grouped_length(pieces, group[owner], len(names))
    return {
        tuple(name): Hidden(total, part)
        for name, total, part in zip(names.tolist(), totals.tolist(), hidden.tolist(), strict=True)
    }


def _summed(parts: dict[tuple[int, ...], Hidden], axis: int) -> dict[int, Hidden]:
    sums: dict[int, Hidden] = {}
    for key, hidden in parts.items():
        sums[key[axis]] = sums.get(key[axis], Hidden()) + hidden
    return dict(sorted(sums.items()))
