"""What every analysis may rely on: times whose sums fit, and no more lanes than anything can be said about.

A file can state any number. Bounds here are far beyond what is recorded, and within them int64 holds every difference
and every sum that is made of times.
"""

from __future__ import annotations

import numpy as np

from moe_eplb.analysis.capture import UNKNOWN, Capture, Table
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.readers.limits import Limits, too_large
from moe_eplb.core.errors import TraceError

__all__ = ["FURTHEST", "require_sound"]

FURTHEST = 1 << 61
"""ns from 0, and of all lengths together."""


def require_sound(capture: Capture, limits: Limits) -> None:
    """Refuse what no program records.

    Raises:
        TraceError: E062 times are too far from 0 or last too long together, E064 there are too many streams or ranks.
    """
    for name, table in capture.tables().items():
        _require_times(capture, name, table)
    if capture.utc is not None and not 0 <= capture.utc <= FURTHEST:
        raise _damaged(capture, f"a wall clock of {capture.utc} ns")
    gpu = capture.gpu
    lanes = len(distinct_rows([gpu["rank"], gpu["device"], gpu["stream"]])[0])
    most = max(lanes, len(capture.ranks), len(np.unique(gpu["process"])))
    if most > limits.lanes:
        raise too_large(capture.source, f"more than {limits.lanes} streams, ranks or processes", f"{most} were read")


def _require_times(capture: Capture, name: str, table: Table) -> None:
    if not len(table):
        return
    starts = table["start"]
    if int(starts.min()) < -FURTHEST or int(starts.max()) > FURTHEST:
        raise _damaged(capture, f"{name}: times of {int(starts.min())} to {int(starts.max())} ns")
    if name == "nodes":
        return
    ends = table["end"]
    lasting = (ends != UNKNOWN) | (name != "ranges")
    if bool((lasting & (ends < starts)).any()):
        raise _damaged(capture, f"{name}: {int((lasting & (ends < starts)).sum())} end before they start")
    together = float((ends[lasting].astype(np.float64) - starts[lasting]).sum())
    if together > FURTHEST:
        raise _damaged(capture, f"{name}: they last {together:.3g} ns together")


def _damaged(capture: Capture, why: str) -> TraceError:
    return TraceError("E062", "a trace has times that cannot be", why=why, where=capture.source)
