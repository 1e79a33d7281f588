"""Recorded calls against the protocol: legal logs replay to their end, the first illegal call is named in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_eplb.analysis.conformance import Replay, replay
from moe_eplb.analysis.run_folder import load
from moe_eplb.analysis.trace import read_trace
from moe_eplb.analysis.verdict import judge
from moe_eplb.core.events import HOST, Kind
from moe_eplb.core.verdict import Status
from tests.support.run_folders import LAYERS, good_run, scripted_run

LAYER = (
    Kind.START_WAIT_GPU_STAGE, Kind.DONE_WAIT_GPU_STAGE, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, Kind.ROUTE,
    Kind.START_SET_CPU_STAGE, Kind.DONE_SET_CPU_STAGE,
)  # fmt: skip


def _replay(tmp_path: Path, kinds: Sequence[Kind], layers: int = 1) -> Replay:
    run = scripted_run(["start_iter"], [None], kinds)
    return replay(read_trace(run.write(tmp_path) / "trace.sqlite"), layers)


def test_a_good_run_replays_to_its_end(tmp_path: Path) -> None:
    folder = load(good_run().write(tmp_path))
    assert folder.trace is not None
    outcome = replay(folder.trace, LAYERS)
    assert outcome.calls == {0: 48, 1: 48}
    assert (outcome.violations, outcome.unfinished) == ([], {})


def test_an_aborted_iteration_starts_clean(tmp_path: Path) -> None:
    kinds = [Kind.START_ITER, *LAYER[:4], Kind.ABORT_ITER, Kind.START_ITER, *LAYER, Kind.END_ITER]
    run = scripted_run(["start_iter"], [None], kinds)
    for record in run.records[6:]:
        record["iteration"] = 1
    outcome = replay(read_trace(run.write(tmp_path) / "trace.sqlite"), 1)
    assert (outcome.violations, outcome.unfinished) == ([], {})


def test_an_iteration_that_is_missing_is_noticed(tmp_path: Path) -> None:
    run = good_run()
    gone = [r for r in run.records if (r["rank"], r["iteration"], r["stream"]) == (1, 2, HOST)]
    run.records = [record for record in run.records if record not in gone]
    (violation,) = replay(read_trace(run.write(tmp_path) / "trace.sqlite"), LAYERS).violations
    assert (violation.rank, violation.code) == (1, "E126")
    assert "3 was started, 2 is next" in violation.what


def test_an_iteration_that_never_ends_is_unfinished(tmp_path: Path) -> None:
    outcome = _replay(tmp_path, [Kind.START_ITER, *LAYER])
    assert outcome.violations == []
    assert outcome.unfinished == {0: "iteration 0 never ended"}


ILLEGAL = {
    "a stage twice": ([Kind.START_ITER, LAYER[0], LAYER[0]], 2),
    "route before the wait is done": ([Kind.START_ITER, LAYER[0], Kind.ROUTE, LAYER[1]], 2),
    "no wait at all": ([Kind.START_ITER, Kind.DONE_WAIT_GPU_STAGE], 1),
    "hand-over without statistics": ([Kind.START_ITER, *LAYER[:2], Kind.ROUTE, Kind.START_SET_CPU_STAGE], 4),
    "outside an iteration": ([*LAYER], 0),
    "an iteration in an iteration": ([Kind.START_ITER, Kind.START_ITER], 1),
    "an end without a start": ([Kind.END_ITER], 0),
    "a layer is skipped": ([Kind.START_ITER, Kind.END_ITER], 1),
    "an end in the middle of a layer": ([Kind.START_ITER, *LAYER[:4], Kind.END_ITER], 5),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_the_first_illegal_call_is_found(what: str, tmp_path: Path) -> None:
    kinds, at = ILLEGAL[what]
    (violation,) = _replay(tmp_path, kinds).violations
    assert (violation.rank, violation.seq) == (0, at)
    assert violation.code.startswith("E1")
    assert len(violation.before) == min(at, 3)
    assert len(violation.after) == min(len(kinds) - at - 1, 3)
    assert f"record {at}" in str(violation)


def test_the_expected_violation_is_valid_and_another_is_not(tmp_path: Path) -> None:
    kinds = [Kind.START_ITER, LAYER[0], LAYER[0]]
    calls = ["start_iter", "start_wait_gpu_stage", "start_wait_gpu_stage"]
    code = _replay(tmp_path / "probe", kinds).violations[0].code
    for expected, recorded, status in (
        (code, kinds, Status.VALID),
        ("E199", kinds, Status.INVALID),
        (code, [*kinds, LAYER[1]], Status.INVALID),
    ):
        error = {"code": expected, "what": "layer 0"}
        run = scripted_run(calls, [None, None, error], recorded, expect_error={"code": expected})
        verdict = judge(run.write(tmp_path / f"{expected}{len(recorded)}"))
        assert {check.name: check.status for check in verdict.checks}["call_order"] is status
