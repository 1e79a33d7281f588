"""Flags of calls that a trace does not give: what they were if every call was meant as it is usually made."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Table
from moe_eplb.analysis.conformance import DYNAMIC, FIRST, LAST
from moe_eplb.core.events import Kind

__all__ = ["infer_flags", "within_iterations"]

_COUNTS = (
    Kind.UPDATE_LOCAL_STATISTIC,
    Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS,
    Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS,
)


def infer_flags(calls: Table) -> tuple[NDArray[np.int64], bool]:
    """Flags of each call [N], and whether any of them had to be inferred.

    The first statistics call of a stage is its first, the last one before the hand-over its last. A layer is dynamic if
    it begins inside an iteration anywhere on its rank. So a wrong flag itself (E105, E106) cannot be seen.
    """
    flags = calls["flags"].astype(np.int64)
    unknown = (flags == c.UNKNOWN) & (calls["kind"] < Kind.START_ITER)
    if not unknown.any():
        return np.maximum(flags, 0), False
    first, last = _first_and_last(calls)
    inferred = first * FIRST + last * LAST + _dynamic(calls) * DYNAMIC
    return np.where(unknown, inferred, np.maximum(flags, 0)), True


def within_iterations(calls: Table) -> NDArray[np.bool_]:
    """Whether an iteration was under way at each call [N], which are by rank and time."""
    index = np.arange(len(calls))
    marks = calls["kind"] >= Kind.START_ITER
    first_of_rank = np.ones(len(calls), np.bool_)
    first_of_rank[1:] = calls["rank"][1:] != calls["rank"][:-1]
    latest = np.maximum.accumulate(np.where(marks | first_of_rank, index, 0))
    return (calls["kind"][latest] == Kind.START_ITER) if len(calls) else np.zeros(0, np.bool_)


def _dynamic(calls: Table) -> NDArray[np.int64]:
    key = calls["rank"].astype(np.int64) << 32 | (calls["layer"].astype(np.int64) & 0xFFFFFFFF)
    begins = (calls["kind"] == Kind.START_WAIT_GPU_STAGE) & within_iterations(calls)
    return np.isin(key, np.unique(key[begins])).astype(np.int64)


def _first_and_last(calls: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which calls are the first and the last statistics of their stage; a stage begins with its wait."""
    first, last = np.zeros(len(calls), np.int64), np.zeros(len(calls), np.int64)
    latest: dict[tuple[int, int], int] = {}
    columns = (calls[name].tolist() for name in ("rank", "kind", "layer"))
    for index, (rank, kind, layer) in enumerate(zip(*columns, strict=True)):
        if kind in _COUNTS:
            if (rank, layer) not in latest:
                first[index] = 1
            latest[rank, layer] = index
        elif kind in (Kind.START_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE):
            before = latest.pop((rank, layer), None)
            if before is not None:
                last[before] = 1
    last[list(latest.values())] = 1
    return first, last
