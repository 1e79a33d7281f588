"""The metrics of the miniature run, and that every metric a threshold may name is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_eplb.analysis.balance import mean_over_max, measured_loads, predicted_rank_loads
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.metrics import measure_run
from moe_eplb.analysis.moves import PlanWaits, plan_waits
from moe_eplb.analysis.run_folder import load
from moe_eplb.core.thresholds import METRICS
from tests.support.run_folders import ITERATIONS, good_run


@pytest.fixture
def measures(tmp_path: Path) -> Measures:
    return measure_run(load(good_run().write(tmp_path)))


def test_every_named_metric_is_measured(measures: Measures) -> None:
    for name, metric in METRICS.items():
        assert name in measures.single
        assert (name in measures.series) is metric.series
    not_measured = {name for name in METRICS if measures.single[name] is None}
    assert not_measured == {"stall.p50_us", "stall.p95_us"}


def test_numbers_of_the_miniature(measures: Measures) -> None:
    # Of 290 ns of balancer work a layer, 190 lie behind the main stream; each commit adds 40 ns that nothing hides.
    assert measures.series["overlap.balancer"] == [190 / 290, 380 / 620, 380 / 620, 380 / 620]
    assert measures.single["overlap.balancer"] == pytest.approx((4 * 380) / (4 * 580 + 3 * 40))
    assert measures.single["exposed.p50_us"] == 0.24
    assert measures.single["step.p50_ms"] == 0.002001
    assert measures.single["moves.slots"] == 7
    assert measures.single["moves.bytes"] == 1344
    assert measures.single["moves.net_share"] == 6 / 12
    assert (measures.single["commits"], measures.single["updates"], measures.single["commits.late"]) == (3, 3, 0)
    assert len(measures.values("balancedness.min")) == ITERATIONS
    assert measures.values("stall.p50_us") == []


def test_a_commit_in_another_iteration_than_planned_is_late(tmp_path: Path) -> None:
    run = good_run()
    for row in run.find("plan", layer=1):
        row["due"] = 1
    assert measure_run(load(run.write(tmp_path))).single["commits.late"] == 1


def test_a_plan_was_waited_for_if_a_rank_waited_longer_than_a_tenth_of_a_millisecond(tmp_path: Path) -> None:
    run = good_run()
    plans = run.find("plan")
    for row in plans:
        row["stall_us"], row["awaited_us"] = 100, 90
    measured = measure_run(load(run.write(tmp_path / "short"))).single
    assert (measured["plans.waited"], measured["plans.longest_wait_ms"]) == (0, 0.1)
    first = [row for row in plans if (row["layer"], row["due"]) == (plans[0]["layer"], plans[0]["due"])]
    assert len(first) == 2, "one of each rank"
    first[0]["stall_us"], first[1]["awaited_us"] = 300, 2500
    other = next(row for row in plans if row not in first)
    other["awaited_us"] = 101
    folder = load(run.write(tmp_path / "long"))
    measured = measure_run(folder).single
    assert (measured["plans.waited"], measured["plans.longest_wait_ms"]) == (2, 2.5)
    assert plan_waits(folder) == PlanWaits(3, 2, 2.5)


def test_a_folder_of_before_the_thread_that_launches_was_timed_is_measured(tmp_path: Path) -> None:
    run = good_run()
    for row in run.find("plan"):
        row.pop("awaited_us", None)
    assert measure_run(load(run.write(tmp_path))).single["plans.waited"] == 0


def test_balancedness_is_over_ranks(tmp_path: Path) -> None:
    run = good_run()
    for row in run.find("received"):
        row["slots"] = [[8, 0, 0], [2, 0, 2]][row["rank"]]
    folder = load(run.write(tmp_path))
    measures = measure_run(folder)
    assert measured_loads(folder).ranks.tolist() == [[8.0, 4.0]] * 8
    assert measures.single["balancedness.mean"] == measures.single["balancedness.min"] == 0.75
    assert measures.series["balancedness.min"] == [0.75] * ITERATIONS


def test_places_that_a_rank_did_not_report_are_not_measured(tmp_path: Path) -> None:
    run = good_run()
    run.remove("received", rank=1, iteration=2)
    loads = measured_loads(load(run.write(tmp_path)))
    assert {place.iteration for place in loads.places} == {0, 1, 3}
    assert sorted(loads.by_layer()) == [0, 1]
    assert loads.by_iteration()[3].shape == (2, 2)


def test_replicas_share_the_load_of_their_expert() -> None:
    loads = predicted_rank_loads([6, 4, 1], [0, 1, 0, 2], ranks=2)
    assert loads.tolist() == [7.0, 4.0]
    assert mean_over_max(loads[np.newaxis]) == 5.5 / 7
    assert mean_over_max(np.zeros((3, 2))) == 1.0
