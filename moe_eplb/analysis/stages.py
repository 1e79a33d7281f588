"""The tables of a text report as plain data; rendering them is the command line's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_eplb.analysis import conformance
from moe_eplb.analysis.balance import (
    first_placements,
    mean_over_max,
    measured_loads,
    predicted_rank_loads,
    routed_counts,
)
from moe_eplb.analysis.moves import LayerMoves, PlanWaits, layer_moves, plan_waits
from moe_eplb.analysis.run_folder import RunFolder
from moe_eplb.analysis.trace import OPEN, Records
from moe_eplb.core.events import HOST, KINDS, STREAMS, UPDATER

__all__ = ["BalanceRow", "Report", "StageRow", "make_report"]


@dataclass(frozen=True, slots=True)
class StageRow:
    """Durations of one kind of record over all ranks. `stream` is a stream's name, ``host`` or ``updater``."""

    name: str
    stream: str
    calls: int
    p50_us: float
    p95_us: float
    p99_us: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class BalanceRow:
    """A layer's balancedness over the run: as measured, and as the first placement gives for the same tokens."""

    layer: int
    static_start: float
    now: float


@dataclass(frozen=True, slots=True)
class Report:
    """All tables of a run. `violation` describes the first illegal call, empty when there is none.

    `waits` is None for a run on CPUs, whose times say nothing of those on a GPU.
    """

    stages: tuple[StageRow, ...]
    moves: tuple[LayerMoves, ...]
    balance: tuple[BalanceRow, ...]
    violation: str
    incomplete: str
    waits: PlanWaits | None = None


def make_report(folder: RunFolder) -> Report:
    """The tables of a loaded run folder; those that need a trace are empty without one."""
    trace = folder.trace
    return Report(
        stages=_stage_rows(trace.records) if trace else (),
        moves=tuple(layer_moves(folder)),
        balance=_balance_rows(folder),
        violation=_first_violation(folder),
        incomplete=trace.incomplete() if trace else "the run left no trace",
        waits=plan_waits(folder) if folder.scenario.device == "cuda" else None,
    )


def _stage_rows(records: Records) -> tuple[StageRow, ...]:
    finished = records.where(records.end != OPEN)
    rows = []
    for kind, info in KINDS.items():
        of_kind = finished.kinds(kind)
        for stream in np.unique(of_kind.stream).tolist():
            rows.append(_stage_row(info.name, stream, of_kind.where(of_kind.stream == stream)))
    return tuple(rows)


def _stage_row(name: str, stream: int, records: Records) -> StageRow:
    microseconds = (records.end - records.start) / 1e3
    p50, p95, p99 = (float(value) for value in np.percentile(microseconds, (50, 95, 99)))
    return StageRow(name, _stream_name(stream), len(records), p50, p95, p99, float(microseconds.sum()) / 1e3)


def _stream_name(stream: int) -> str:
    named = {HOST: "host", UPDATER: "updater"} | dict(enumerate(STREAMS))
    return named.get(stream, f"stream {stream}")


def _balance_rows(folder: RunFolder) -> tuple[BalanceRow, ...]:
    loads, counts, first = measured_loads(folder), routed_counts(folder), first_placements(folder)
    rows = []
    for layer, measured in loads.by_layer().items():
        of_layer = [here for place, here in counts.items() if place.layer == layer]
        if layer in first and of_layer:
            stayed = [predicted_rank_loads(here, first[layer]["slots"], len(folder.ranks)) for here in of_layer]
            rows.append(BalanceRow(layer, mean_over_max(np.array(stayed)), mean_over_max(measured)))
    return tuple(rows)


def _first_violation(folder: RunFolder) -> str:
    if folder.trace is None:
        return ""
    violations = conformance.replay(folder.trace, folder.dynamic_layers).violations
    return str(violations[0]) if violations else ""
