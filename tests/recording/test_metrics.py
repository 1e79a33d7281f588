"""The metrics after a hand-made sequence of probe calls, after a real balancer's, and in the documents."""

from __future__ import annotations

import inspect
import math
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from moe_eplb.balancer import updater
from moe_eplb.core import planner as planner_module
from moe_eplb.core.errors import ExitCode, UsageError
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import plan
from moe_eplb.core.probe import NullProbe, Probe, Probes
from moe_eplb.recording.metrics import METRICS, BalancerMetrics, MetricsFile
from tests.support.balanced import Rig

README = Path(__file__).parents[2] / "README.md"
PLACEMENT = Placement(2, 4, np.array([0, 1, 2, 3], dtype=np.int32))
COUNTS = np.ones(4, dtype=np.int64)
WORST, MEAN = (f'moe_eplb_balancedness{{stat="{stat}"}}' for stat in ("worst", "mean"))


def exposed(registry: CollectorRegistry) -> dict[str, float]:
    """Value by name and labels, from the text that a server would read."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> BalancerMetrics:
    return BalancerMetrics(registry)


def count(metrics: Probe, *balancedness: float) -> None:
    """All layers of an iteration report."""
    for layer, value in enumerate(balancedness):
        metrics.reduced(layer, COUNTS, value)


def commit(metrics: Probe, layer: int, changed: int, size: int) -> None:
    metrics.committed(layer, 0, PLACEMENT, np.arange(changed), size)


def test_before_anything_nothing_is_claimed(metrics: BalancerMetrics, registry: CollectorRegistry) -> None:
    values = exposed(registry)
    assert math.isnan(values.pop(WORST))
    assert math.isnan(values.pop(MEAN))
    assert set(values.values()) == {0.0}


def test_values_follow_what_the_probe_is_told(metrics: BalancerMetrics, registry: CollectorRegistry) -> None:
    count(metrics, 0.5, 0.75, 1.0)
    assert math.isnan(exposed(registry)[WORST]), "an iteration counts when it has ended"
    metrics.iterated(0)
    assert (exposed(registry)[WORST], exposed(registry)[MEAN]) == (0.5, 0.75)
    assert exposed(registry)["moe_eplb_plan_age_iterations"] == 1

    commit(metrics, 0, 3, 300)
    commit(metrics, 1, 2, 50)
    metrics.stalled(2, 0.25)
    metrics.dropped(2, 1, 1, False, "late")
    count(metrics, 1.0, 0.9, 0.8)
    metrics.iterated(1)
    metrics.iterated(2)  # without statistics: the last ones stay
    commit(metrics, 2, 1, 10)
    metrics.stalled(0, 0.5)
    metrics.awaited(0, 0.125)
    metrics.awaited(1, 1.0)
    metrics.iterated(3)
    assert exposed(registry) == {
        WORST: 0.8,
        MEAN: pytest.approx(0.9),
        "moe_eplb_rebalances_total": 3,
        "moe_eplb_dropped_plans_total": 1,
        "moe_eplb_slots_moved_total": 6,
        "moe_eplb_moved_bytes_total": 360,
        "moe_eplb_stall_seconds_total": 0.75,
        "moe_eplb_launch_wait_seconds_total": 1.125,
        "moe_eplb_plan_age_iterations": 3,  # iterations 1, 2 and 3 for layers 0 and 1
    }


def test_the_plan_age_is_that_of_the_oldest_layer(metrics: BalancerMetrics, registry: CollectorRegistry) -> None:
    ages = []
    for iteration in range(6):
        if iteration in (2, 3):
            commit(metrics, iteration - 2, 1, 1)
        count(metrics, 1.0, 1.0)
        metrics.iterated(iteration)
        ages.append(exposed(registry)["moe_eplb_plan_age_iterations"])
    assert ages == [1, 2, 3, 2, 3, 4]


def test_the_number_of_series_does_not_grow_with_layers(metrics: BalancerMetrics, registry: CollectorRegistry) -> None:
    before = exposed(registry).keys()
    for iteration in range(3):
        count(metrics, *[0.5] * 100)
        for layer in range(100):
            commit(metrics, layer, 1, 1)
            metrics.stalled(layer, 0.1)
        metrics.iterated(iteration)
    assert exposed(registry).keys() == before
    assert len(before) == 9


def test_the_text_has_exactly_the_named_metrics_with_their_types(
    metrics: BalancerMetrics, registry: CollectorRegistry
) -> None:
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    # The parser gives a counter's family without the suffix that its sample has.
    found = {(f.name + "_total" * (f.type == "counter"), f.type, f.documentation) for f in families}
    assert found == {(name, info.kind, info.meaning) for name, info in METRICS.items()}
    assert {sample.name for family in families for sample in family.samples} == METRICS.keys()


def test_the_readme_documents_exactly_these_metrics() -> None:
    assert documented(README.read_text(encoding="utf-8")) == METRICS.keys()


def documented(text: str) -> set[str]:
    """Names in the first column of a table, without labels."""
    return set(re.findall(r"^\| `(moe_eplb_\w+)(?:\{[^`]*\})?` *\|", text, re.MULTILINE))


def test_a_missing_or_wrong_name_in_a_document_is_noticed() -> None:
    rows = [f"| `{name}` | {info.meaning} |" for name, info in METRICS.items()]
    assert documented("\n".join(rows)) == METRICS.keys()
    assert documented("\n".join(rows[1:])) != METRICS.keys()
    assert documented("\n".join([*rows, "| `moe_eplb_speed` | none |"])) != METRICS.keys()


@pytest.mark.parametrize("seed", [None, 3])
def test_a_real_balancer_fills_them(seed: int | None, registry: CollectorRegistry) -> None:
    rig = Rig(3, updates=1, empty_group="never", seed=seed)
    rig.balancer.probe = Probes(rig.journal, BalancerMetrics(registry))
    rig.iterate(9)
    rig.balancer.shutdown()
    values = exposed(registry)
    assert values["moe_eplb_rebalances_total"] == len(rig.journal.commits) == 8
    assert values["moe_eplb_slots_moved_total"] > 0
    assert values["moe_eplb_moved_bytes_total"] == values["moe_eplb_slots_moved_total"] * 3 * 4 * 4  # all on one rank
    # Layers 1, 2 and 0 got their latest placements in iterations 5 or later, one after the other.
    latest = {layer: when for layer, _, when in rig.journal.commits}
    assert values["moe_eplb_plan_age_iterations"] == 9 - min(latest.values())
    assert values["moe_eplb_dropped_plans_total"] == 0
    assert 0 < values[WORST] <= values[MEAN] <= 1


@pytest.mark.parametrize("finished", [True, False])
def test_only_an_unfinished_update_counts_as_stall(
    finished: bool, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(planner_module, "plan", lambda *given, **named: gate.wait(30) and plan(*given, **named))
    rig = Rig(2, updates=1, empty_group="never", update_timeout_s=30.0)
    rig.balancer.probe = BalancerMetrics(registry)
    wait = rig.balancer.updater.wait

    def wait_and_open(update: updater.Update) -> bool:
        threading.Timer(0.2, gate.set).start()
        return wait(update)

    monkeypatch.setattr(rig.balancer.updater, "wait", wait_and_open)
    rig.balancer.start_iter()
    rig.run_layer(0)
    update = rig.layers[0].updates.pending
    assert update is not None
    if finished:
        gate.set()
        assert update.done.wait(30)
    rig.run_layer(1)  # its statistics carry the vote on layer 0's plan
    rig.balancer.end_iter()
    stalled = exposed(registry)["moe_eplb_stall_seconds_total"]
    assert stalled == 0 if finished else 0.2 <= stalled < 30
    assert update.agreed
    rig.balancer.shutdown()


def test_the_file_is_there_from_the_start_and_always_whole(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.prom")
    first = (tmp_path / "metrics.prom").read_text()
    commit(file.probe, 0, 2, 8)
    assert (tmp_path / "metrics.prom").read_text() == first
    before = (tmp_path / "metrics.prom").stat().st_ino
    file.write()
    assert (tmp_path / "metrics.prom").stat().st_ino != before, "replaced, not overwritten"
    assert "moe_eplb_slots_moved_total 2.0" in (tmp_path / "metrics.prom").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.prom"]


def test_the_process_wide_registry_is_the_default() -> None:
    metrics = BalancerMetrics()
    try:
        assert exposed(REGISTRY).keys() >= METRICS.keys() - {"moe_eplb_balancedness"}
        with pytest.raises(ValueError, match="moe_eplb_balancedness"):
            BalancerMetrics()
    finally:
        REGISTRY.unregister(metrics)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError) as caught:
        BalancerMetrics()
    assert (caught.value.code, caught.value.exit_code) == ("E018", ExitCode.USAGE)
    assert "moe-eplb[metrics]" in caught.value.hint
    with pytest.raises(UsageError, match="prometheus-client"):
        MetricsFile(tmp_path / "metrics.prom")


def test_probes_pass_every_call_on_in_order() -> None:
    class Heard(NullProbe):
        def __getattribute__(self, name: str) -> object:
            return lambda *given: calls.append((object.__getattribute__(self, "number"), name, given))

        def __init__(self, number: int) -> None:
            object.__setattr__(self, "number", number)

    calls: list[tuple[object, ...]] = []
    both = Probes(Heard(0), Heard(1))
    names = [name for name, _ in inspect.getmembers(Probe, inspect.isfunction) if not name.startswith("_")]
    assert len(names) == 13
    for name in names:
        given = tuple(range(len(inspect.signature(getattr(Probe, name)).parameters) - 1))
        getattr(both, name)(*given)
        assert calls == [(0, name, given), (1, name, given)]
        calls.clear()
