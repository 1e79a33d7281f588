"""The scenario's own thresholds."""

from __future__ import annotations

from moe_eplb.analysis.measures import Measures
from moe_eplb.core.thresholds import METRICS, Threshold
from moe_eplb.core.verdict import CheckResult, Status

__all__ = ["judge_threshold"]


def judge_threshold(threshold: Threshold, measures: Measures) -> CheckResult:
    """One threshold; a metric that was not measured is unknown, never a pass."""
    values = measures.values(threshold.metric)
    seen, holds = threshold.judge(values)
    unit = METRICS[threshold.metric].unit
    expected = f"{threshold.agg + ' ' if threshold.agg else ''}{threshold.op} {threshold.number:g} {unit}".rstrip()
    name = f"threshold {threshold.metric}"
    if holds is None:
        return CheckResult(name, Status.UNKNOWN, "not measured", expected, METRICS[threshold.metric].meaning)
    status = Status.VALID if holds else Status.INVALID
    return CheckResult(name, status, f"{seen:.6g} {unit}".rstrip(), expected, f"{len(values)} values")
