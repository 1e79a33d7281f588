"""The numbers of a report under names, for the conditions under which a report fails."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.trace_report import TraceReport
from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.core.events import Role
from moe_eplb.core.thresholds import METRICS, Metric, Threshold, parse
from moe_eplb.core.verdict import CheckResult, Status

__all__ = ["REPORT_METRICS", "judge_limit", "parse_limits", "report_measures"]

_OF_TRACES = {
    "exposed.max_us": Metric("the largest balancer work of any iteration that nothing hides", "us"),
    "stall.share": Metric("main-stream time lost to the balancer / time of the steps"),
    "critical_path.balancer_share": Metric("the balancer's part of what a step's length is made of"),
    "idle.share": Metric("idle time of the GPUs / their idle and busy time"),
    "unknown.share": Metric("GPU time whose role no rule knows / all GPU time"),
    "skew.max_us": Metric("the largest difference of the ranks' starts of one collective", "us"),
}
REPORT_METRICS: Mapping[str, Metric] = METRICS | _OF_TRACES
"""Every metric that a report can fail by."""

_LIMIT = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(.*)", re.DOTALL)
_OPPOSITE = {">": "<=", ">=": "<", "<": ">=", "<=": ">", "==": "!=", "!=": "=="}


def parse_limits(texts: Iterable[str]) -> tuple[Threshold, ...]:
    """Conditions under which a report fails, such as ``exposed.p95_us > 50``, as thresholds that must hold.

    Raises:
        UsageError: E081 a condition does not parse or names no metric.
    """
    return tuple(map(_limit, texts))


def judge_limit(threshold: Threshold, measures: Measures) -> CheckResult:
    """One condition; a metric that the trace does not give is unknown, never a pass."""
    info = REPORT_METRICS[threshold.metric]
    values = measures.values(threshold.metric)
    seen, holds = threshold.judge(values)
    expected = f"{threshold.agg + ' ' if threshold.agg else ''}{threshold.op} {threshold.number:g} {info.unit}".rstrip()
    name = f"limit {threshold.metric}"
    if holds is None or seen is None:
        return CheckResult(name, Status.UNKNOWN, "not in this trace", expected, info.meaning)
    status = Status.VALID if holds else Status.INVALID
    return CheckResult(name, status, f"{seen:.6g} {info.unit}".rstrip(), expected, info.meaning)


def report_measures(report: TraceReport) -> Measures:
    """All metrics of a report; what needs iterations is not there when the trace tells of none."""
    measures = Measures()
    single, series = measures.single, measures.series
    for name, pair in report.pairs.items():
        shares = [hidden.overlap for iteration, hidden in pair.iterations.items() if iteration >= 0]
        series[f"overlap.{name}"] = [share for share in shares if share is not None]
        single[f"overlap.{name}"] = pair.whole.overlap
    _spread(single, "exposed.{}_us", _of_iterations(report.pairs["balancer"].worst, 1e3), ("p50", "p95", "max"))
    steps = report.path.steps if report.path is not None else {}
    _spread(single, "step.{}_ms", _of_iterations(steps, 1e6), ("p50", "p95"))
    _stall(single, report, steps)
    single["critical_path.balancer_share"] = _balancer_share(report)
    single["idle.share"] = _idle_share(report)
    total = sum(row.total_ns for row in report.roles)
    unknown = sum(row.total_ns for row in report.roles if row.role is Role.UNKNOWN)
    single["unknown.share"] = unknown / total if total else None
    single["skew.max_us"] = max((row.skew_max_ns / 1e3 for row in report.collectives), default=None)
    return measures


def _limit(text: str) -> Threshold:
    match = _LIMIT.fullmatch(text)
    hint = "write 'METRIC [p50|p95|p99|min|max|mean] OP NUMBER', such as 'exposed.p95_us > 50'"
    if match is None:
        raise UsageError("E081", f"the condition {text[:60]!r} does not parse", hint=hint)
    try:
        found = parse(match[1], match[2], REPORT_METRICS)
    except ScenarioError as error:
        what = f"the condition {text[:60]!r} does not parse" if error.code == "E035" else error.what
        raise UsageError("E081", what, hint=error.hint if error.code == "E036" else hint) from error
    return Threshold(found.metric, found.agg, _OPPOSITE[found.op], found.number)


def _of_iterations(values: Mapping[int, int], unit: float) -> list[float]:
    return [value / unit for iteration, value in values.items() if iteration >= 0]


def _spread(single: dict[str, float | None], name: str, values: Sequence[float], wanted: Sequence[str]) -> None:
    for what in wanted:
        percent = 100 if what == "max" else int(what[1:])
        single[name.format(what)] = float(np.percentile(values, percent)) if len(values) else None


def _stall(single: dict[str, float | None], report: TraceReport, steps: Mapping[int, int]) -> None:
    """Iterations without a stall count as 0, since a trace that records waits would show one."""
    if report.stall is None or not steps:
        single |= dict.fromkeys(("stall.p50_us", "stall.p95_us", "stall.share"))
        return
    worst = {iteration: report.stall.worst.get(iteration, 0) for iteration in steps}
    _spread(single, "stall.{}_us", _of_iterations(worst, 1e3), ("p50", "p95"))
    whole = sum(ns for iteration, ns in steps.items() if iteration >= 0)
    single["stall.share"] = sum(worst.values()) / whole if whole else None


def _idle_share(report: TraceReport) -> float | None:
    """Of the GPUs that have selected events. Of some layers it is not known, since idle time belongs to none."""
    span = sum(row.span_ns for row in report.idle)
    return sum(row.idle_ns for row in report.idle) / span if span and report.all_layers else None


def _balancer_share(report: TraceReport) -> float | None:
    """Not known where the path may have missed waits: it would be too small."""
    return report.path.balancer_share if report.path is not None and report.path.waits_known else None
