"""The numbers of a run or a trace by name, apart from how they are had."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_eplb.analysis.overlap import Overlap

__all__ = ["Measures"]


@dataclass
class Measures:
    """Every metric of a run.

    Attributes:
        single: One number for the run, None where nothing was measured. Series have theirs here too: of ratios the
            ratio of the sums over the run, of `balancedness.min` the smallest.
        series: One value an iteration, for the iterations in which there is one.
        overlaps: The measured pairs, empty without a trace.
    """

    single: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)
    overlaps: dict[str, Overlap] = field(default_factory=dict)

    def values(self, metric: str) -> list[float]:
        """What a threshold on the metric judges; empty when it was not measured."""
        if metric in self.series:
            return self.series[metric]
        value = self.single.get(metric)
        return [] if value is None else [value]
