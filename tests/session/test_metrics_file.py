"""A run that keeps metrics leaves a file that says what the evidence says."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.evidence import Row, read_evidence
from moe_eplb.core.verdict import Status
from moe_eplb.session import run_scenario
from moe_eplb.session.folder import evidence_path

TEXT = """\
name: metrics
ranks: 2
iterations: 6
model: {layers: 2, experts: 8, top_k: 2, hidden: 16, intermediate: 16}
workload: {kind: zipf, tokens_per_rank: 16, drift_every: 2}
balancer: {num_slots: 12, layer_updates_per_iter: 2, empty_group: never}
record: {metrics: true}
"""


def _values(folder: Path) -> dict[str, float]:
    text = (folder / "metrics.prom").read_text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {"/".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def test_the_file_says_what_the_evidence_says(tmp_path: Path) -> None:
    result = run_scenario(scenarios.loads(TEXT, "metrics.yaml"), tmp_path / "run")
    assert result.verdict.status is Status.VALID
    rows = list(read_evidence(evidence_path(tmp_path / "run", 0)))
    commits = [row for row in rows if row["row"] == Row.COMMIT]
    last = [row["value"] for row in rows if row["row"] == Row.BALANCE and row["iteration"] == 5]
    values = _values(tmp_path / "run")
    assert values["moe_eplb_rebalances_total"] == len(commits) == 10
    assert values["moe_eplb_slots_moved_total"] == sum(len(row["changed"]) for row in commits) > 0
    assert values["moe_eplb_moved_bytes_total"] == sum(row["bytes"] for row in commits) > 0
    assert values["moe_eplb_dropped_plans_total"] == 0
    assert values["moe_eplb_plan_age_iterations"] == 1
    assert values["moe_eplb_balancedness/worst"] == min(last)
    assert values["moe_eplb_balancedness/mean"] == pytest.approx(sum(last) / 2)
    stalls = [row["stall_us"] for row in rows if row["row"] == Row.PLAN]
    assert values["moe_eplb_stall_seconds_total"] * 1e6 == pytest.approx(sum(stalls), abs=len(stalls))


def test_a_balancer_that_is_off_leaves_a_file_that_claims_nothing(tmp_path: Path) -> None:
    static = scenarios.loads(TEXT, "metrics.yaml", ["balancer.layer_updates_per_iter=0", "iterations=2"])
    assert run_scenario(static, tmp_path / "run").verdict.failure == ""
    values = _values(tmp_path / "run")
    assert values["moe_eplb_rebalances_total"] == 0
    assert values["moe_eplb_balancedness/worst"] != values["moe_eplb_balancedness/worst"], "not a number"


def test_no_metrics_unless_asked_for(tmp_path: Path) -> None:
    quiet = scenarios.loads(TEXT, "metrics.yaml", ["record.metrics=false", "iterations=2"])
    run_scenario(quiet, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.prom").exists()
