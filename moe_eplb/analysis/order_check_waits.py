"""Is waiting counted as work anywhere: an event whose name tells of waiting must not have a role that works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_eplb.analysis.call_names import CallNames
from moe_eplb.analysis.capture import ROLES, Capture, role_codes
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.role_table import load_role_table
from moe_eplb.core.events import KINDS, Role, by_name
from moe_eplb.core.verdict import CheckResult

__all__ = ["waits_not_work"]

_WAITING = (Role.COMM_WAIT, Role.EPLB_WAIT)
_NO_WORK = role_codes((*_WAITING, Role.OTHER, Role.UNKNOWN))


def waits_not_work(capture: Capture, names: CallNames, role_tables: Sequence[Path] = ()) -> CheckResult:
    """No GPU event that waits, by its name, counts as compute, communication or the balancer's work."""
    findings = Findings("waits_not_work", "what waits has a role of waiting")
    gpu, table = capture.gpu, load_role_table(role_tables)
    if not len(gpu):
        findings.missing("the trace has no GPU events")
    used = np.unique(gpu["name"]).tolist()
    by_role = {name for name in used if table.by_name(capture.names[name]) in _WAITING}
    waiting = [name for name in used if name in by_role or _waits(capture.names[name], names)]
    told = np.isin(gpu["name"], waiting)
    for row in np.flatnonzero(told & ~np.isin(gpu["role"], _NO_WORK)).tolist():
        event = gpu[row]
        where = f"rank {event['rank']}, {event['start']} ns"
        lasts = int(event["end"] - event["start"])
        findings.wrong(f"{capture.names[event['name']]} waits and counts as {ROLES[event['role']]}, {lasts} ns", where)
    return findings.result(f"{int(told.sum())} of {len(gpu)} GPU events wait")


def _waits(name: str, names: CallNames) -> bool:
    kind = names.by_kernel(name)
    kind = by_name(name) if kind is None else kind
    return kind is not None and KINDS[kind].role in _WAITING
