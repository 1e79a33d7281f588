"""Recorded runs, good and bad, are judged today as they were when they were recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_eplb.analysis.verdict import judge
from moe_eplb.core.verdict import Status, Verdict

TRACES = Path(__file__).parents[2] / "traces"
GOOD, BAD = sorted((TRACES / "good").iterdir()), sorted((TRACES / "bad").iterdir())


def test_there_are_runs_of_both_kinds() -> None:
    assert len(GOOD) >= 2
    assert len(BAD) >= 5


@pytest.mark.parametrize("folder", GOOD, ids=lambda folder: folder.name)
def test_a_good_run_is_valid(folder: Path) -> None:
    verdict = judge(folder)
    assert verdict.failure == ""
    assert {check.name: check.status for check in verdict.checks if check.status is not Status.VALID} == {}


@pytest.mark.parametrize("folder", BAD, ids=lambda folder: folder.name)
def test_a_bad_run_is_rejected_by_the_check_meant_for_it(folder: Path) -> None:
    verdict = judge(folder)
    status = {check.name: check.status for check in verdict.checks}
    assert verdict.failure == ""
    assert status[folder.name.partition("-")[0]] is Status.INVALID


@pytest.mark.parametrize("folder", GOOD + BAD, ids=lambda folder: folder.name)
def test_the_verdict_is_the_recorded_one(folder: Path) -> None:
    recorded = Verdict.from_json(json.loads((folder / "verdict.json").read_text()))
    assert {c.name: c.status for c in judge(folder).checks} == {c.name: c.status for c in recorded.checks}
