"""The numbers of a run, under the names that thresholds use (`moe_eplb.core.thresholds.METRICS`)."""

from __future__ import annotations

import numpy as np

from moe_eplb.analysis.balance import (
    Loads,
    first_placements,
    mean_over_max,
    measured_loads,
    predicted_rank_loads,
    routed_counts,
)
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.moves import late_commits, layer_moves, plan_waits
from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.run_folder import RunFolder
from moe_eplb.analysis.trace import OPEN, Trace
from moe_eplb.core.events import Kind
from moe_eplb.core.evidence import Row

__all__ = ["measure_run"]


def measure_run(folder: RunFolder) -> Measures:
    """All metrics that the folder's evidence and trace give."""
    measures = Measures()
    _balancedness(folder, measures)
    _moves(folder, measures)
    if folder.trace is not None:
        _overlap(folder.trace, measures)
        _steps(folder.trace, measures)
    # Waits of the main stream leave no record in this trace, so the stall is not known rather than none.
    measures.single |= dict.fromkeys(("stall.p50_us", "stall.p95_us"))
    return measures


def _balancedness(folder: RunFolder, measures: Measures) -> None:
    loads = measured_loads(folder)
    per_iteration = loads.by_iteration().values()
    lowest = [min(mean_over_max(row[np.newaxis]) for row in rows) for rows in per_iteration]
    measures.series["balancedness.min"] = lowest
    measures.series["balancedness.mean"] = [mean_over_max(rows) for rows in per_iteration]
    measures.single["balancedness.min"] = min(lowest, default=None)
    measures.single["balancedness.mean"] = mean_over_max(loads.ranks) if loads.places else None
    for layer, rows in loads.by_layer().items():
        measures.single[f"balancedness.layer.{layer}"] = mean_over_max(rows)
    measures.single["balancedness.gain"] = _gain(folder, loads)


def _gain(folder: RunFolder, loads: Loads) -> float | None:
    """Measured balancedness / that of the same tokens if the first placement had stayed."""
    first, counts = first_placements(folder), routed_counts(folder)
    places = [place for place in loads.places if place.layer in first and place in counts]
    if not places:
        return None
    stayed = [predicted_rank_loads(counts[p], first[p.layer]["slots"], len(folder.ranks)) for p in places]
    known = set(places)
    measured = loads.ranks[[place in known for place in loads.places]]
    return mean_over_max(measured) / mean_over_max(np.array(stayed))


def _moves(folder: RunFolder, measures: Measures) -> None:
    moves = layer_moves(folder)
    slots = sum(layer.slots for layer in moves)
    rows = folder.evidence
    waits = plan_waits(folder)
    measures.single |= {
        "moves.slots": sum(layer.moved_slots for layer in moves),
        "moves.bytes": sum(layer.bytes for layer in moves),
        "moves.net_share": sum(layer.net_slots for layer in moves) / slots if slots else None,
        "moves.cross_rank_net_share": sum(layer.cross_rank_net_slots for layer in moves) / slots if slots else None,
        "commits": sum(layer.commits for layer in moves),
        "commits.late": late_commits(folder),
        "plans.dropped": len({(row["layer"], row["due"]) for row in rows.rows(Row.DROPPED)}),
        "plans.waited": waits.waited,
        "plans.longest_wait_ms": waits.longest_ms,
        "updates": len({(row["layer"], row["taken"]) for row in rows.rows(Row.PLAN)}),
    }


def _overlap(trace: Trace, measures: Measures) -> None:
    for name, pair in PAIRS.items():
        overlap = measures.overlaps[name] = measure(trace.records, pair)
        shares = [hidden.overlap for hidden in overlap.by_iteration().values()]
        measures.series[f"overlap.{name}"] = [share for share in shares if share is not None]
        measures.single[f"overlap.{name}"] = overlap.whole.overlap
        measures.single[f"exposed.{name}_us"] = overlap.whole.exposed / 1e3
    exposed = np.array(measures.overlaps["balancer"].worst_exposed(), dtype=np.float64) / 1e3
    measures.single |= _percentiles("exposed.p{}_us", exposed)


def _steps(trace: Trace, measures: Measures) -> None:
    steps = trace.records.kinds(Kind.STEP)
    steps = steps.where(steps.end != OPEN)
    iterations, index = np.unique(steps.iteration, return_inverse=True)
    slowest = np.zeros(len(iterations), dtype=np.int64)
    np.maximum.at(slowest, index, steps.end - steps.start)
    measures.single |= _percentiles("step.p{}_ms", slowest / 1e6)


def _percentiles(name: str, values: np.ndarray) -> dict[str, float | None]:
    return {name.format(q): float(np.percentile(values, q)) if len(values) else None for q in (50, 95)}
