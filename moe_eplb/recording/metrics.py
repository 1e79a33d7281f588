"""The balancer's state for Prometheus, in nine series whatever the number of layers and ranks.

A serving engine attaches `BalancerMetrics` to its balancer and exposes the registry as it does its own:

    balancer.probe = BalancerMetrics()
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import NullProbe

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["METRICS", "BalancerMetrics", "MetricsFile"]


class _Info(NamedTuple):
    """`kind` is Prometheus' own word."""

    kind: str
    meaning: str


METRICS = {
    "moe_eplb_balancedness": _Info(
        "gauge", 'Mean / max of the rank loads in the last iteration that counted: stat="worst" or "mean" of the layers'
    ),
    "moe_eplb_rebalances_total": _Info("counter", "Placements of a layer that came into force"),
    "moe_eplb_dropped_plans_total": _Info("counter", "Plans that the ranks gave up"),
    "moe_eplb_slots_moved_total": _Info("counter", "Slots, of all ranks, that got another expert"),
    "moe_eplb_moved_bytes_total": _Info("counter", "Bytes of weights that this rank has written into its slots"),
    "moe_eplb_stall_seconds_total": _Info("counter", "Seconds that this rank's model waited for unfinished updates"),
    "moe_eplb_launch_wait_seconds_total": _Info(
        "counter", "Seconds that the thread that launches the model waited for plans; the GPU may have been busy"
    ),
    "moe_eplb_plan_age_iterations": _Info(
        "gauge", "Iterations that the layer has run whose placement is the oldest, since that placement or the start"
    ),
}
"""All metrics by name."""


class BalancerMetrics(NullProbe):
    """A `Probe` whose numbers Prometheus collects; a collector of its own, so that a step costs a few additions.

    Balancedness is not a number until an iteration has been counted, since 0 would say that one rank does everything.

    Args:
        registry: Where to register, by default the process-wide one; it takes one of these.

    Raises:
        UsageError: E018 without the package prometheus-client.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._iterations = self._rebalances = self._dropped = self._slots = self._bytes = self._age = 0
        self._stall_s = self._launch_wait_s = 0.0
        self._worst = self._mean = float("nan")
        self._balancedness: dict[int, float] = {}
        self._placed: dict[int, int] = {}
        (_package().REGISTRY if registry is None else registry).register(self)

    # -- Probe -----------------------------------------------------------------------------------------------------

    def reduced(self, layer: int, counts: np.ndarray, balancedness: float) -> None:
        self._balancedness[layer] = balancedness
        self._placed.setdefault(layer, 0)

    def stalled(self, layer: int, seconds: float) -> None:
        self._stall_s += seconds

    def awaited(self, layer: int, seconds: float) -> None:
        self._launch_wait_s += seconds

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, moved_bytes: int) -> None:
        self._rebalances += 1
        self._slots += len(changed)
        self._bytes += moved_bytes
        self._placed[layer] = self._iterations

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        self._dropped += 1

    def iterated(self, iteration: int) -> None:
        self._iterations += 1
        self._age = self._iterations - min(self._placed.values(), default=0)
        if self._balancedness:
            values = self._balancedness.values()
            self._worst, self._mean = min(values), sum(values) / len(values)
            self._balancedness.clear()

    # -- prometheus_client's collector, called on whatever thread exposes the registry -------------------------------

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value; see `METRICS`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        name = "moe_eplb_balancedness"
        balancedness = GaugeMetricFamily(name, METRICS[name].meaning, labels=["stat"])
        balancedness.add_metric(["worst"], self._worst)
        balancedness.add_metric(["mean"], self._mean)
        yield balancedness
        for name, value in self._single().items():
            family = CounterMetricFamily if METRICS[name].kind == "counter" else GaugeMetricFamily
            yield family(name, METRICS[name].meaning, value=value)

    def _single(self) -> dict[str, float]:
        return {
            "moe_eplb_rebalances_total": self._rebalances,
            "moe_eplb_dropped_plans_total": self._dropped,
            "moe_eplb_slots_moved_total": self._slots,
            "moe_eplb_moved_bytes_total": self._bytes,
            "moe_eplb_stall_seconds_total": self._stall_s,
            "moe_eplb_launch_wait_seconds_total": self._launch_wait_s,
            "moe_eplb_plan_age_iterations": self._age,
        }


class MetricsFile:
    """Metrics of a run as a text file, which every `write` replaces as a whole.

    Args:
        path: The file; it is there from the start.

    Attributes:
        probe: What fills it.

    Raises:
        UsageError: E018, see `BalancerMetrics`.
    """

    def __init__(self, path: Path) -> None:
        self._registry, self._path = _package().CollectorRegistry(), path
        self.probe = BalancerMetrics(self._registry)
        self.write()

    def write(self) -> None:
        """Replace the file by one with the present values."""
        _package().write_to_textfile(str(self._path), self._registry)


def _package() -> ModuleType:
    try:
        import prometheus_client
    except ImportError as error:
        raise UsageError(
            "E018", "metrics need the package prometheus-client", why=str(error), hint="pip install 'moe-eplb[metrics]'"
        ) from error
    return prometheus_client
