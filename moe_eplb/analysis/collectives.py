"""The same collective on every rank: who came last, how long the others waited, how uneven the work before it was.

A collective is a kernel that communicates by its role, unless its name tells of something else: the range around a
collective gives its role to copies, fills and small kernels beside it, too. The n-th of a name on each rank belong
together. All ranks leave a collective at about the same time, since none can end before the last has come, so what lies
between a rank's start and the last start is waiting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Names, role_codes
from moe_eplb.analysis.grouping import members
from moe_eplb.analysis.intervals import coverage, intervals, union
from moe_eplb.core.events import Role

__all__ = ["Collectives", "Straggling", "collective_kernels", "match_collectives", "stem", "straggling"]

_COMMUNICATION = role_codes((Role.COMM, Role.COMM_WAIT, Role.EPLB_ALLREDUCE))
_TELLS_NOTHING = [c.UNSET_ROLE, *role_codes((Role.UNKNOWN,))]
_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+")
_ALL_WAIT = re.compile(
    r"all_?reduce|all_?gather|reduce_?scatter|barrier|all_?to_?all|^statistic_reduce$|^prepare$", re.IGNORECASE
)
"""Collectives in which every rank needs something of every other one; a broadcast's root may leave at once."""


@dataclass(frozen=True)
class Collectives:
    """Collectives that all ranks took part in, by the first rank's order.

    Attributes:
        ranks: Ranks [R].
        rows: Row in `Capture.gpu` [N, R] of each collective on each rank.
        unmatched: Collectives for which some rank has no partner.
    """

    ranks: list[int]
    rows: NDArray[np.int64]
    unmatched: int


@dataclass(frozen=True)
class Straggling:
    """What each rank did to each collective; times in ns.

    Attributes:
        name: Name of each collective [N].
        late: How much later than the first rank each rank started [N, R].
        waited: How long each rank waited for the last one to start, at most until its own end [N, R].
        imbalance: Largest / mean compute of the ranks since the collective before it [N]; NaN-free, 1 without compute.
        last: Which rank [N] came last.
    """

    ranks: list[int]
    name: list[str]
    late: NDArray[np.int64]
    waited: NDArray[np.int64]
    imbalance: NDArray[np.float64]
    last: NDArray[np.int64]
    unmatched: int

    def late_histogram(self) -> dict[int, int]:
        """How often each rank came last."""
        return {rank: int((self.last == rank).sum()) for rank in self.ranks}


def stem(name: str) -> str:
    """A name without its numbers, which may differ between the ranks."""
    return _NUMBER.sub("#", name)


def collective_kernels(capture: Capture, *, all_wait: bool = False) -> NDArray[np.bool_]:
    """Which GPU events [G] of a capture that has roles are collectives.

    Args:
        all_wait: Only those whose names say that no rank can leave them before the last has entered.
    """
    gpu = capture.gpu
    waits = np.array([_ALL_WAIT.search(name) is not None for name in capture.names], np.bool_)
    chosen: NDArray[np.bool_] = waits[gpu["name"]]
    if not all_wait:
        chosen |= np.isin(gpu["named"], [*_TELLS_NOTHING, *_COMMUNICATION])
    chosen &= np.isin(gpu["role"], _COMMUNICATION) & (gpu["kind"] == c.KERNEL)
    return chosen


def match_collectives(capture: Capture, ranks: Sequence[int] | None = None, *, all_wait: bool = False) -> Collectives:
    """Pair the collectives of all ranks by name and order, see `collective_kernels`.

    A name that ranks launched unequally often is left out: which of them belong together cannot be known.

    Args:
        ranks: Ranks that must take part, in order, by default those that have GPU events. In a part of a capture some
            may have none, and nobody knows then who came last.
    """
    ranks = np.unique(capture.gpu["rank"]).tolist() if ranks is None else list(ranks)
    chosen = collective_kernels(capture, all_wait=all_wait)
    of_rank = [_by_name(capture, chosen & (capture.gpu["rank"] == rank)) for rank in ranks]
    rows: list[NDArray[np.int64]] = []
    unmatched = 0
    for name in dict.fromkeys(name for named in of_rank for name in named):
        each = [named.get(name, np.empty(0, np.int64)) for named in of_rank]
        if len(ranks) > 1 and len({len(one) for one in each}) == 1:
            rows.append(np.stack(each, axis=1))
        else:
            unmatched += sum(map(len, each))
    if not rows:
        return Collectives(ranks, np.empty((0, max(len(ranks), 1)), np.int64), unmatched)
    found = np.concatenate(rows)
    return Collectives(ranks, found[np.argsort(capture.gpu["start"][found[:, 0]], kind="stable")], unmatched)


def straggling(capture: Capture, ranks: Sequence[int] | None = None) -> Straggling:
    """Stragglers and imbalance of every collective, on clocks that are taken to be aligned.

    Args:
        capture: One with roles, see `moe_eplb.analysis.roles.prepare`.
        ranks: Ranks that must take part, see `match_collectives`.
    """
    found = _of_one_iteration(capture, match_collectives(capture, ranks))
    starts, ends = capture.gpu["start"][found.rows], capture.gpu["end"][found.rows]
    count = len(found.rows)
    first, last = (starts.min(axis=1), starts.max(axis=1)) if count else (np.empty(0, np.int64),) * 2
    return Straggling(
        ranks=found.ranks, name=[capture.names[n] for n in capture.gpu["name"][found.rows[:, 0]]],
        late=starts - first[:, np.newaxis], waited=np.minimum(last[:, np.newaxis], ends) - starts,
        imbalance=_imbalance(capture, found), unmatched=found.unmatched,
        last=np.array(found.ranks, np.int64)[starts.argmax(axis=1)] if count else np.empty(0, np.int64),
    )  # fmt: skip


def _of_one_iteration(capture: Capture, found: Collectives) -> Collectives:
    """Without those whose ranks name different iterations: as many of a name are of the same only by chance then."""
    iteration = capture.gpu["iteration"][found.rows]
    apart = (iteration != iteration[:, :1]).any(axis=1) & (iteration >= 0).all(axis=1)
    unmatched = found.unmatched + int(apart.sum()) * len(found.ranks)
    return replace(found, rows=found.rows[~apart], unmatched=unmatched)


def _by_name(capture: Capture, chosen: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
    """Rows of a rank's collectives by name without its numbers, in order of start."""
    gpu, rows = capture.gpu, np.flatnonzero(chosen)
    rows = rows[np.argsort(gpu["start"][rows], kind="stable")]
    numbers, used = np.unique(gpu["name"][rows], return_inverse=True)
    stems = Names()
    of_name = np.array(stems.numbers(stem(capture.names[number]) for number in numbers.tolist()), np.int64)
    return {name: np.sort(rows[mine]) for name, mine in zip(stems, members(of_name[used], len(stems)), strict=True)}


def _imbalance(capture: Capture, found: Collectives) -> NDArray[np.float64]:
    gpu, compute = capture.gpu, np.isin(capture.gpu["role"], role_codes((Role.COMPUTE,)))
    work = np.zeros(found.rows.shape, np.float64)
    for column, rank in enumerate(found.ranks):
        mine = gpu[compute & (gpu["rank"] == rank)]
        busy = coverage(union(intervals(mine["start"], mine["end"])), gpu["start"][found.rows[:, column]])
        work[:, column] = np.diff(busy, prepend=0)
    mean = work.mean(axis=1) if work.size else np.empty(0)
    return np.where(mean > 0, work.max(axis=1, initial=0) / np.where(mean > 0, mean, 1), 1.0)
