"""What a layer routed, and for how many tokens, must be what the workload asks for, in all its runs together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from moe_eplb.analysis.verdict import judge
from moe_eplb.core import scenario as scenarios
from moe_eplb.core import workload
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import CheckResult, Status
from tests.support.run_folders import EXPERTS, HIDDEN, LAYERS, TOP_K, RunBuilder, good_run
from tests.support.workloads import DRAWN

REPEATS = {1: 3}
SIZES = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "intermediate": HIDDEN}


def run_of(work: str) -> tuple[RunBuilder, Scenario]:
    """A run in miniature whose second layer runs three times, and which routes what its workload asks for."""
    run = good_run(workload=yaml.safe_load(work), model=SIZES | {"repeated_layers": REPEATS})
    scenario = scenarios.loads(yaml.safe_dump(run.scenario), "miniature")
    for row in run.find("routed") if workload.is_drawn(scenario) else []:
        repeats = range(REPEATS.get(row["layer"], 1))
        ids = [workload.topk_ids(scenario, row["iteration"], row["layer"], row["rank"], repeat) for repeat in repeats]
        row["counts"] = sum(np.bincount(i.ravel(), minlength=EXPERTS) for i in ids if i is not None).tolist()
    for name in ("dispatch", "equality"):
        for row in run.find(name):
            tokens = workload.tokens(scenario, row["iteration"], row["rank"]) * REPEATS.get(row["layer"], 1)
            row |= {"expected": tokens * TOP_K, "once": tokens * TOP_K} if name == "dispatch" else {"tokens": tokens}
    return run, scenario


def judged(run: RunBuilder, folder: Path) -> dict[str, CheckResult]:
    return {check.name: check for check in judge(run.write(folder)).checks}


def small(kind: str) -> str:
    """A workload of a kind that fits the miniature's four experts."""
    more = {"idle": "idle_experts: 2", "hot_rank": "hot_rank: 1", "burst": "burst_every: 2"}
    return "{" + ", ".join(part for part in (f"kind: {kind}", more.get(kind, ""), "tokens_per_rank: 5") if part) + "}"


@pytest.mark.parametrize("kind", DRAWN)
def test_every_drawn_kind_is_drawn_again(kind: str, tmp_path: Path) -> None:
    run, _ = run_of(small(kind))
    assert judged(run, tmp_path / "asked")["run_complete"].status is Status.VALID
    row = run.find("routed", rank=1, layer=1, iteration=3)[0]
    most = int(np.argmax(row["counts"]))
    row["counts"][most] -= 1
    row["counts"][most - 1] += 1
    check = judged(run, tmp_path / "other")["run_complete"]
    assert check.status is Status.INVALID
    assert (check.where, "the scenario asks for" in check.detail) == ("layer 1, iteration 3", True)


def test_one_run_of_a_repeated_layer_is_not_all_of_them(tmp_path: Path) -> None:
    run, scenario = run_of("{kind: uniform, tokens_per_rank: 5}")
    ids = workload.topk_ids(scenario, 2, 1, 0)
    assert ids is not None
    run.find("routed", rank=0, layer=1, iteration=2)[0]["counts"] = np.bincount(ids.ravel(), minlength=EXPERTS).tolist()
    assert judged(run, tmp_path)["run_complete"].status is Status.INVALID


@pytest.mark.parametrize(
    "work",
    [
        "{kind: model, tokens_per_rank: [5, 2]}",
        "{kind: model, tokens_per_rank: [5, 0], ragged: 1.0}",
        "{kind: model, tokens_per_rank: 3, steps: mixed, prompt_tokens: 4}",
        "{kind: burst, tokens_per_rank: 2, burst_every: 2}",
    ],
)
def test_tokens_are_those_of_the_iteration_and_of_all_runs_of_the_layer(work: str, tmp_path: Path) -> None:
    run, scenario = run_of(work)
    checks = judged(run, tmp_path / "asked")
    assert checks["exactly_once"].status is Status.VALID
    assert checks["equality"].status is Status.VALID
    tokens = workload.tokens(scenario, 1, 0)
    run.find("dispatch", rank=0, layer=1, iteration=1)[0].update(expected=tokens * TOP_K, once=tokens * TOP_K)
    run.find("equality", rank=0, layer=1, iteration=1)[0]["tokens"] = tokens
    checks = judged(run, tmp_path / "one")
    assert f"{tokens * TOP_K} entries looked at, the rank routes {3 * tokens * TOP_K}" in checks["exactly_once"].detail
    assert checks["equality"].status is Status.UNKNOWN
    assert f"{tokens} of {3 * tokens} tokens were compared" in checks["equality"].detail
