"""When the work of a stage ran: one layer of one iteration on one rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_eplb.analysis.trace import Records

__all__ = ["Span", "Stage", "spans"]


class Stage(NamedTuple):
    """One layer of one iteration on one rank."""

    rank: int
    layer: int
    iteration: int


class Span(NamedTuple):
    """From the first start to the last end of records."""

    start: int
    end: int


def spans(records: Records) -> dict[Stage, Span]:
    """The span of the records of each stage that has any."""
    if not len(records):
        return {}
    keys = np.stack([records.rank, records.layer, records.iteration], axis=1)
    names, index = np.unique(keys, axis=0, return_inverse=True)
    starts = np.full(len(names), np.iinfo(np.int64).max)
    ends = np.zeros(len(names), dtype=np.int64)
    np.minimum.at(starts, index.reshape(-1), records.start)
    np.maximum.at(ends, index.reshape(-1), records.end)
    rows = zip(names.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return {Stage(*name): Span(start, end) for name, start, end in rows}
