"""Thresholds on metrics, written ``[agg] op number`` and parsed before anything starts.

Metrics that have one value an iteration (series) take an aggregate; without one, every value must hold.
Metrics of the whole run (single) take none.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_eplb.core.errors import ScenarioError

__all__ = ["METRICS", "Metric", "Threshold", "parse", "parse_all"]


class Metric(NamedTuple):
    """What a metric means, its unit ("" for a ratio or a count) and whether it has one value an iteration."""

    meaning: str
    unit: str = ""
    series: bool = False


METRICS: dict[str, Metric] = {
    "balancedness.min": Metric("mean rank load / max rank load of the worst layer", series=True),
    "balancedness.mean": Metric("sum over layers of the mean rank load / sum over layers of the max", series=True),
    "balancedness.gain": Metric("balancedness.mean as measured / as the initial placement gives for the same tokens"),
    "overlap.balancer": Metric(
        "balancer work hidden behind main-stream compute and data-moving communication", "", True
    ),
    "overlap.balancer_compute": Metric("balancer work hidden behind main-stream compute alone", "", True),
    "overlap.communication": Metric("data-moving communication hidden behind compute of the other streams", "", True),
    "overlap.communication_waits": Metric("the same with the communication's waits counted as communication", "", True),
    "overlap.statistic": Metric("the histogram and load update, hidden behind main-stream work", "", True),
    "overlap.reduction": Metric("the statistics' reduction over ranks, hidden behind main-stream work", "", True),
    "overlap.handover": Metric("the hand-over between device and host, hidden behind main-stream work", "", True),
    "overlap.migration": Metric("staging and committing weights, hidden behind main-stream work", "", True),
    "exposed.p50_us": Metric("median over iterations of the balancer work that nothing hides", "us"),
    "exposed.p95_us": Metric("95th percentile over iterations of the balancer work that nothing hides", "us"),
    "stall.p50_us": Metric("median over iterations of main-stream idle that ends at a wait for the balancer", "us"),
    "stall.p95_us": Metric("95th percentile of main-stream idle that ends at a wait for the balancer", "us"),
    "step.p50_ms": Metric("median duration of an iteration on the slowest rank", "ms"),
    "step.p95_ms": Metric("95th percentile of the duration of an iteration on the slowest rank", "ms"),
    "moves.slots": Metric("slots whose expert changed, over all layers and commits"),
    "moves.bytes": Metric("weight bytes written by commits, over all ranks", "B"),
    "moves.net_share": Metric("slots that hold another expert at the end than at the start / all slots"),
    "moves.cross_rank_net_share": Metric(
        "slots whose expert at the end was not on their rank at the start / all slots"
    ),
    "commits": Metric("commits, over all layers"),
    "commits.late": Metric("commits that came after their iteration"),
    "plans.dropped": Metric("plans given up by all ranks"),
    "plans.waited": Metric("plans for which a rank waited more than 0.1 ms: its device, or the thread that launches"),
    "plans.longest_wait_ms": Metric("the longest of these waits; a larger commit_delay leaves plans more time", "ms"),
    "updates": Metric("updates taken, over all layers"),
}

_GRAMMAR = re.compile(
    r"\s*(?:(?P<agg>p50|p95|p99|min|max|mean)\s*)?(?P<op>>=|<=|==|!=|>|<)\s*"
    r"(?P<number>[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_PERCENT = {"min": 0, "p50": 50, "p95": 95, "p99": 99, "max": 100}
_OPS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Threshold:
    """One parsed threshold. `agg` is None for "every value"."""

    metric: str
    agg: str | None
    op: str
    number: float

    def __str__(self) -> str:
        return " ".join([self.metric, *([self.agg] if self.agg else []), self.op, f"{self.number:g}"])

    def judge(self, values: Sequence[float]) -> tuple[float | None, bool | None]:
        """What is compared, and whether it holds; (None, None) when there is no value: unknown, never a pass.

        Without an aggregate the compared value is the first that does not hold, else the one closest to failing.
        """
        known = np.asarray(values, dtype=np.float64)
        if known.size == 0 or not np.isfinite(known).all():
            return None, None
        if self.agg is not None:
            seen = _aggregate(self.agg, known)
            return seen, _OPS[self.op](seen, self.number)
        bad = [float(v) for v in known if not _OPS[self.op](float(v), self.number)]
        if bad:
            return bad[0], False
        return float(known.max() if self.op[0] == "<" else known.min()), True


def parse(metric: str, text: str, metrics: Mapping[str, Metric] = METRICS) -> Threshold:
    """One threshold on one of some metrics; E035 when the text does not parse, E036 when there is no such metric."""
    info = metrics.get(metric)
    if info is None:
        near = difflib.get_close_matches(metric, metrics, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(metrics)}"
        raise ScenarioError("E036", f"there is no metric {metric!r}", hint=hint)
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        hint = "write '[p50|p95|p99|min|max|mean] op number', such as 'p50 >= 0.9'"
        raise ScenarioError("E035", f"the threshold {text[:60]!r} of {metric!r} does not parse", hint=hint)
    if match["agg"] and not info.series:
        hint = f"write '{match['op']} {match['number']}'"
        raise ScenarioError("E035", f"{metric!r} is one number for the run, it takes no {match['agg']!r}", hint=hint)
    number = float(match["number"])
    if not math.isfinite(number):
        raise ScenarioError("E035", f"the number of the threshold of {metric!r} is not finite", why=match["number"])
    return Threshold(metric, match["agg"], match["op"], number)


def parse_all(texts: Mapping[str, str]) -> tuple[Threshold, ...]:
    """Every threshold of a mapping from metric to text."""
    return tuple(parse(metric, text) for metric, text in texts.items())


def _aggregate(agg: str, values: np.ndarray) -> float:
    if agg == "mean":
        return float(values.mean())
    return float(np.percentile(values, _PERCENT[agg]))
