"""Runs that replay graphs: the evidence is enough for a good one, and each piece that is wrong or missing is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_eplb.analysis.conformance import replay
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.readers.records import read_records
from moe_eplb.analysis.run_folder import load
from moe_eplb.analysis.verdict import judge
from moe_eplb.core.events import CAPTURED, DEVICE_STAGES, HOST, Kind
from moe_eplb.core.verdict import CheckResult, Status
from tests.support.graph_runs import REPLAYED, graph_run, host
from tests.support.run_folders import LAYERS, RANKS, STEP_NS, Record, RunBuilder

Damage = Callable[[RunBuilder], None]


def _bad(run: RunBuilder, folder: Path) -> dict[str, CheckResult]:
    checks = judge(run.write(folder)).checks
    return {check.name: check for check in checks if check.status is not Status.VALID}


def _drop(run: RunBuilder, kind: Kind, *, on_host: bool, **fields: int) -> None:
    gone = run.find_records(kind, host=on_host, **fields)
    assert gone
    run.records = [record for record in run.records if not any(record is one for one in gone)]


def _one(run: RunBuilder, kind: Kind, *, on_host: bool, **fields: int) -> Record:
    (found,) = run.find_records(kind, host=on_host, **fields)
    return found


def test_a_good_run_is_valid_and_its_calls_are_those_of_the_capture(tmp_path: Path) -> None:
    run = graph_run()
    assert _bad(run, tmp_path / "run") == {}
    folder = load(tmp_path / "run")
    assert folder.trace is not None
    outcome = replay(folder.trace, LAYERS)
    assert (outcome.calls, outcome.violations, outcome.unfinished) == ({0: 24, 1: 24}, [], {})
    names = [check.name for check in judge(tmp_path / "run").checks]
    assert "graph_order" in names


def test_the_report_of_a_good_run_is_valid_too(tmp_path: Path) -> None:
    found = check_order(read_records(graph_run().write(tmp_path) / "trace.sqlite"))
    assert {check.name: check.status for check in found.checks if check.status is not Status.VALID} == {}
    assert found.calls == {0: 24, 1: 24}
    assert found.check("graph_order").observed == f"{RANKS * len(REPLAYED)} replays"


# -- iterations and replays ---


def _replay_without_start(run: RunBuilder) -> None:
    _drop(run, Kind.START_ITER, on_host=True, iteration=3)
    _drop(run, Kind.END_ITER, on_host=True, iteration=3)


def _iteration_without_replay(run: RunBuilder) -> None:
    _drop(run, Kind.REPLAY, on_host=True, rank=1, iteration=2)


def _replayed_twice(run: RunBuilder) -> None:
    one = _one(run, Kind.REPLAY, on_host=True, rank=0, iteration=2)
    run.records.append(one | {"start": one["start"] + 5, "end": one["end"] + 5})


def _replayed_before_the_start(run: RunBuilder) -> None:
    one = _one(run, Kind.REPLAY, on_host=True, rank=0, iteration=2)
    one["start"] = one["end"] = _one(run, Kind.START_ITER, on_host=True, rank=0, iteration=2)["start"] - 10


def _capture_counts_as_an_execution(run: RunBuilder) -> None:
    """An iteration begins before the capture and ends after it, and replays nothing."""
    _drop(run, Kind.REPLAY, on_host=True, iteration=1)
    for rank in range(RANKS):
        capture = _one(run, Kind.CAPTURE, on_host=True, rank=rank)
        begin = _one(run, Kind.START_ITER, on_host=True, rank=rank, iteration=1)
        begin["start"] = begin["end"] = capture["start"]
        capture["start"] += 1


def _calls_beside_a_replay(run: RunBuilder) -> None:
    """An iteration replays and calls its layers, too: it runs twice."""
    eager = [r for r in run.records if r["stream"] == HOST and r["kind"] <= Kind.DONE_SET_CPU_STAGE]
    run.records += [r | {"iteration": 2, "start": r["start"] + 3 * STEP_NS, "end": r["end"] + 3 * STEP_NS}
                    for r in eager if r["iteration"] == 0]  # fmt: skip


def _never_replayed(run: RunBuilder) -> None:
    _drop(run, Kind.REPLAY, on_host=True)


ITERATIONS: dict[str, tuple[Damage, str]] = {
    "a replay without start_iter": (_replay_without_start, "outside any iteration"),
    "an iteration without a replay": (_iteration_without_replay, "0 replays, no calls"),
    "an iteration replayed twice": (_replayed_twice, "2 replays, no calls"),
    "a capture counted as an execution": (_capture_counts_as_an_execution, "0 replays, no calls"),
    "calls beside a replay": (_calls_beside_a_replay, "1 replays, and calls"),
    "not a single replay": (_never_replayed, "0 replays, no calls"),
}


@pytest.mark.parametrize("what", ITERATIONS)
def test_an_execution_too_few_or_too_many_is_invalid(what: str, tmp_path: Path) -> None:
    damage, said = ITERATIONS[what]
    run = graph_run()
    damage(run)
    bad = _bad(run, tmp_path)
    assert {name: bad[name].status for name in ("graph_order", "call_order")} == {
        "graph_order": Status.INVALID, "call_order": Status.INVALID,
    }  # fmt: skip
    assert said in bad["graph_order"].detail
    assert check_order(read_records(tmp_path / "trace.sqlite")).check("call_order").status is Status.INVALID


def test_a_replay_before_its_iteration_is_illegal(tmp_path: Path) -> None:
    run = graph_run()
    _replayed_before_the_start(run)
    bad = _bad(run, tmp_path)
    assert bad["call_order"].status is Status.INVALID
    assert "E122" in bad["call_order"].detail


# -- captures ---


def _illegal(run: RunBuilder) -> None:
    """The hand-over is called where the wait should be done."""
    call = _one(run, Kind.DONE_WAIT_GPU_STAGE, on_host=True, rank=1, layer=1, iteration=CAPTURED)
    call["kind"] = int(Kind.START_SET_CPU_STAGE)


def _layers_swapped(run: RunBuilder) -> None:
    for record in run.records:
        if record["rank"] == 0 and record["iteration"] == CAPTURED and record["layer"] >= 0:
            record["layer"] = 1 - record["layer"]


def _layer_missing(run: RunBuilder) -> None:
    gone = [r for r in run.records if (r["rank"], r["layer"], r["iteration"]) == (0, 1, CAPTURED)]
    run.records = [record for record in run.records if record not in gone]


def _cut_off(run: RunBuilder) -> None:
    """The last layer was not handed over."""
    for kind in (Kind.START_SET_CPU_STAGE, Kind.DONE_SET_CPU_STAGE):
        _drop(run, kind, on_host=True, rank=0, layer=LAYERS - 1, iteration=CAPTURED)


def _called_twice(run: RunBuilder) -> None:
    """A forward more than the capture has."""
    calls = [r for r in run.records if (r["rank"], r["iteration"], r["layer"]) == (0, CAPTURED, 0)]
    run.records += [r | {"start": r["start"] + 2_000, "end": r["end"] + 2_000} for r in calls]


CAPTURES: dict[str, Damage] = {
    "an illegal order": _illegal,
    "layers out of order": _layers_swapped,
    "a layer is missing": _layer_missing,
    "the last layer is not handed over": _cut_off,
    "a layer is called twice": _called_twice,
}


@pytest.mark.parametrize("what", CAPTURES)
def test_a_capture_with_a_fault_is_invalid(what: str, tmp_path: Path) -> None:
    run = graph_run()
    CAPTURES[what](run)
    assert _bad(run, tmp_path)["call_order"].status is Status.INVALID
    report = check_order(read_records(tmp_path / "trace.sqlite"))
    assert report.check("call_order").status is Status.INVALID
    assert report.check("graph_order").status is not Status.VALID


def test_layers_that_no_capture_has_are_told_by_the_judge_of_graphs(tmp_path: Path) -> None:
    run = graph_run()
    _layer_missing(run)
    found = _bad(run, tmp_path)["graph_order"]
    assert (found.status, found.detail) == (Status.INVALID, "rank 0: layer 1 was called 0 times in 1 captures")


def test_a_graph_without_its_capture_is_unknown(tmp_path: Path) -> None:
    run = graph_run()
    _one(run, Kind.REPLAY, on_host=True, rank=1, iteration=3)["a"] = 7
    found = _bad(run, tmp_path)
    assert {name: check.status for name, check in found.items()} == {"graph_order": Status.UNKNOWN}
    assert "no capture of graphs [7]" in found["graph_order"].detail


def test_two_captures_are_two_forwards(tmp_path: Path) -> None:
    """Another batch size is captured later; its graph is the one that is replayed from then on."""
    run = graph_run()
    shift = 2 * STEP_NS
    for record in run.records:
        if record["iteration"] > 1 or (record["iteration"] == 1 and record["kind"] == Kind.PLAN):
            record["start"] += shift
            record["end"] += shift
    again = [
        r | {"start": r["start"] + shift, "end": r["end"] + shift} for r in run.records if r["iteration"] == CAPTURED
    ]
    for record in again:
        record["a"] = 1 if record["kind"] == Kind.CAPTURE else record["a"]
    run.records += again
    for iteration in (2, 3):
        for rank in range(RANKS):
            _one(run, Kind.REPLAY, on_host=True, rank=rank, iteration=iteration)["a"] = 1
    assert _bad(run, tmp_path) == {}
    report = check_order(read_records(tmp_path / "trace.sqlite"))
    assert {check.name for check in report.checks if check.status is not Status.VALID} == set()


# -- what the device leaves ---


@pytest.mark.parametrize("stage", range(len(DEVICE_STAGES)))
def test_a_stage_that_the_device_did_not_write_down_is_invalid(stage: int, tmp_path: Path) -> None:
    run = graph_run()
    _drop(run, Kind.DEVICE_STAGE, on_host=True, rank=1, layer=1, iteration=2, a=stage)
    found = _bad(run, tmp_path)
    assert {name: check.status for name, check in found.items()} == {"graph_order": Status.INVALID}
    assert (found["graph_order"].detail, found["graph_order"].where) == (
        f"rank 1: the device did not do {DEVICE_STAGES[stage]}", "layer 1, iteration 2",
    )  # fmt: skip
    assert check_order(read_records(tmp_path / "trace.sqlite")).check("graph_order").status is Status.INVALID


def test_a_stage_that_the_device_did_in_another_iteration_is_invalid(tmp_path: Path) -> None:
    run = graph_run()
    _one(run, Kind.DEVICE_STAGE, on_host=True, rank=0, layer=0, iteration=3, a=2)["iteration"] = 2
    assert _bad(run, tmp_path)["graph_order"].status is Status.INVALID


def test_notes_that_a_full_log_has_dropped_prove_nothing(tmp_path: Path) -> None:
    run = graph_run()
    _drop(run, Kind.DEVICE_STAGE, on_host=True, rank=1)
    run.dropped[1] = 24
    assert _bad(run, tmp_path)["graph_order"].status is Status.UNKNOWN


@pytest.mark.parametrize("kind", [Kind.ROUTE, Kind.EXPERTS, Kind.COMBINE])
def test_a_replay_without_a_layers_work_is_unknown(kind: Kind, tmp_path: Path) -> None:
    run = graph_run()
    _drop(run, kind, on_host=False, rank=0, layer=1, iteration=3)
    found = _bad(run, tmp_path)
    assert found["graph_order"].status is Status.UNKNOWN
    assert "no record of" in found["graph_order"].detail
    assert set(found) <= {"graph_order", "stream_join"}


OUT_OF_ORDER: dict[str, tuple[Kind, str, int]] = {
    "route before the wait ended": (Kind.START_WAIT_GPU_STAGE, "end", 60),
    "experts before the wait ended": (Kind.EXPERTS, "start", -225),
    "statistics before the wait ended": (Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, "start", -45),
    "the hand-over before the experts ended": (Kind.EXPERTS, "end", 11),
    "the hand-over before statistics ended": (Kind.LOAD_UPDATE, "end", 291),
}


@pytest.mark.parametrize("what", OUT_OF_ORDER)
def test_work_of_a_replay_out_of_order_is_invalid(what: str, tmp_path: Path) -> None:
    kind, end, by = OUT_OF_ORDER[what]
    run = graph_run()
    _one(run, kind, on_host=False, rank=1, layer=1, iteration=2)[end] += by
    found = _bad(run, tmp_path)
    assert {name: check.status for name, check in found.items()} == {"stream_join": Status.INVALID}


def test_work_that_did_not_wait_at_the_capture_is_invalid(tmp_path: Path) -> None:
    run = graph_run()
    moment = _one(run, Kind.CAPTURE, on_host=True, rank=0)["start"] + 200
    noted = host(Kind.UNORDERED, 0, CAPTURED, moment, layer=1, a=Kind.ROUTE)
    run.records.append(noted | {"stream": 0, "b": Kind.START_WAIT_GPU_STAGE << 8 | 4})
    assert _bad(run, tmp_path)["stream_join"].status is Status.INVALID
