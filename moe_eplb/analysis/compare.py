"""Two traces of the same work, iteration by iteration and layer by layer: what got slower beyond noise.

Values of the same iteration (and layer) are pairs. A metric got worse if the 95 % interval of the median difference
lies wholly beyond both a share of the first trace's median and a floor in us, below which nobody cares.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.report import Report
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.core.errors import TraceError
from moe_eplb.core.samples import Difference, paired_difference
from moe_eplb.core.verdict import CheckResult, Status

__all__ = ["METRICS", "Change", "Compared", "Tolerance", "compare_reports"]

METRICS: Mapping[str, str] = {
    "step": "an iteration on the slowest rank, from its first launch to the end of its last GPU event",
    "exposed": "balancer work that nothing hides, on the worst rank",
    "stall": "main-stream time lost to the balancer, on the worst rank",
    "communication_exposed": "data-moving communication that no compute hides, over all ranks",
    "statistic": "the histogram and load update, over all ranks",
    "reduction": "the statistics' reduction, over all ranks",
    "handover": "the hand-over between device and host, over all ranks",
    "migration": "staging and committing weights, over all ranks",
}
"""What is compared by iteration, in us."""
_WORK = ("statistic", "reduction", "handover", "migration")
_MOST_PAIRS = 20_000


class Change(enum.StrEnum):
    """How the second trace differs; unclear: the interval reaches into the tolerance; unknown: too few pairs."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"
    UNCLEAR = "unclear"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Differences that do not count: up to a share of the first median, up to us; and how many pairs there must be."""

    share: float = 0.05
    floor_us: float = 1.0
    pairs: int = 10


@dataclass(frozen=True, slots=True)
class Compared:
    """A metric of both traces. `layer` is -1 for the iteration as a whole; medians in us, None without pairs."""

    metric: str
    layer: int
    pairs: int
    first_us: float | None
    second_us: float | None
    difference: Difference | None
    change: Change


def compare_reports(
    first: Report, second: Report, tolerance: Tolerance, gates: Sequence[str] = tuple(METRICS)
) -> tuple[list[Compared], tuple[CheckResult, ...]]:
    """Compare reports by iteration, then the balancer's exposed work by layer, and judge some of the metrics.

    A metric that neither trace has is left out; one that only one of them has cannot be judged.

    Raises:
        TraceError: E082 a report holds no trace.
    """
    mine, theirs = _series(first), _series(second)
    found = [_compared(name, -1, mine[name], theirs[name], tolerance) for name in METRICS if mine[name] or theirs[name]]
    checks = tuple(_check(one, tolerance) for one in found if one.metric in gates)
    layers_mine, layers_theirs = _layers(first), _layers(second)
    for layer in sorted({*layers_mine, *layers_theirs}):
        found.append(_compared("exposed", layer, layers_mine.get(layer, {}), layers_theirs.get(layer, {}), tolerance))
    return found, checks


def _series(report: Report) -> dict[str, dict[int, float]]:
    trace = report.trace
    if trace is None:
        raise TraceError("E082", "there is nothing to compare: the run left no trace", where=report.name)
    series: dict[str, Mapping[int, int]] = {name: {} for name in METRICS}
    series["exposed"] = trace.pairs["balancer"].worst
    if trace.path is not None:
        series["step"] = trace.path.steps
    if trace.stall is not None and trace.path is not None:
        series["stall"] = {iteration: trace.stall.worst.get(iteration, 0) for iteration in trace.path.steps}
    series["communication_exposed"] = {i: h.exposed for i, h in trace.pairs["communication"].iterations.items()}
    for name in _WORK:
        series[name] = {i: hidden.total for i, hidden in trace.pairs[name].iterations.items()}
    return {name: {i: ns / 1e3 for i, ns in values.items() if i >= 0} for name, values in series.items()}


def _layers(report: Report) -> dict[int, dict[int, float]]:
    """The balancer's exposed us by layer and iteration, over all ranks."""
    if report.capture is None or report.trace is None:
        return {}
    found: dict[int, dict[int, float]] = {}
    wanted = set(report.trace.iterations), set(report.trace.layers), set(report.trace.ranks)
    for (rank, iteration, layer), hidden in measure(work_of_capture(report.capture), PAIRS["balancer"]).cells.items():
        if iteration in wanted[0] and layer in wanted[1] and rank in wanted[2]:
            of_layer = found.setdefault(layer, {})
            of_layer[iteration] = of_layer.get(iteration, 0.0) + hidden.exposed / 1e3
    return found


def _compared(
    metric: str, layer: int, first: Mapping[int, float], second: Mapping[int, float], tolerance: Tolerance
) -> Compared:
    common = sorted(first.keys() & second.keys())[:_MOST_PAIRS]
    if not common:
        return Compared(metric, layer, 0, None, None, None, Change.UNKNOWN)
    a, b = [first[i] for i in common], [second[i] for i in common]
    medians = float(np.median(a)), float(np.median(b))
    difference = paired_difference(a, b)
    change = _change(difference, medians[0], tolerance) if len(common) >= tolerance.pairs else Change.UNKNOWN
    return Compared(metric, layer, len(common), *medians, difference, change)


def _change(difference: Difference, median: float, tolerance: Tolerance) -> Change:
    allowed = max(tolerance.share * median, tolerance.floor_us)
    if difference.low > allowed:
        return Change.WORSE
    if difference.high < -allowed:
        return Change.BETTER
    return Change.SAME if -allowed <= difference.low and difference.high <= allowed else Change.UNCLEAR


def _check(one: Compared, tolerance: Tolerance) -> CheckResult:
    status = {Change.WORSE: Status.INVALID, Change.UNKNOWN: Status.UNKNOWN}.get(one.change, Status.VALID)
    expected = f"not more than {tolerance.share:.0%} and {tolerance.floor_us:g} us slower"
    if one.difference is None or one.change is Change.UNKNOWN:
        observed = f"{one.pairs} iterations in common, {tolerance.pairs} are needed"
        return CheckResult(f"compare {one.metric}", status, observed, expected, METRICS[one.metric])
    d = one.difference
    observed = f"{one.first_us:.4g} -> {one.second_us:.4g} us: {d.median:+.4g} us, 95 % {d.low:+.4g} to {d.high:+.4g}"
    return CheckResult(f"compare {one.metric}", status, observed, expected, METRICS[one.metric])
