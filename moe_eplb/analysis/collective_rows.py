"""Collectives of all ranks by name: how far the ranks were apart, how long they waited, and who came last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.collectives import straggling

__all__ = ["CollectiveRow", "collective_rows"]


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """All collectives of one name; times in ns on clocks that are taken to be aligned.

    Attributes:
        skew_p50_ns, skew_max_ns: Last start - first start over the ranks.
        waited_ns: What the ranks waited for the last one, summed.
        imbalance: Median over collectives of largest / mean compute of the ranks before it.
        last: How often each rank came last.
    """

    name: str
    count: int
    skew_p50_ns: int
    skew_max_ns: int
    waited_ns: int
    imbalance: float
    last: dict[int, int]


def collective_rows(capture: Capture, ranks: Sequence[int] | None = None) -> tuple[tuple[CollectiveRow, ...], int]:
    """Rows by name, those that cost most waiting first, and how many of them found no partner on some rank.

    Of a single rank there are none.

    Args:
        ranks: Ranks that must take part, see `match_collectives`.
    """
    found = straggling(capture, ranks)
    if len(found.ranks) < 2:
        return (), 0  # nobody to be early or late against
    names, group = np.unique(np.array(found.name, dtype=object), return_inverse=True)
    rows = []
    for number, name in enumerate(names.tolist()):
        mine = np.flatnonzero(group == number)
        skew = found.late[mine].max(axis=1)
        rows.append(
            CollectiveRow(
                name, len(mine), int(np.median(skew)), int(skew.max()), int(found.waited[mine].sum()),
                float(np.median(found.imbalance[mine])),
                {rank: int((found.last[mine] == rank).sum()) for rank in found.ranks},
            )
        )  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (-row.waited_ns, row.name))), found.unmatched
