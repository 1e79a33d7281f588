"""A good run is valid; damaged in one respect, just the check for that respect says so."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_eplb.analysis.verdict import judge
from moe_eplb.core import scenario as scenarios
from moe_eplb.core import workload
from moe_eplb.core.errors import ExitCode, TraceError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import Status, Verdict
from tests.support.run_folders import (
    DECAY,
    EXPERTS,
    PER_RANK,
    TOKENS,
    RowDict,
    RunBuilder,
    digest,
    for_all,
    good_run,
    scripted_run,
)

Damage = Callable[[RunBuilder], Any]


def _bad(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.status.value for check in verdict.checks if check.status is not Status.VALID}


def test_a_good_run_is_valid(tmp_path: Path) -> None:
    verdict = judge(good_run().write(tmp_path))
    assert _bad(verdict) == {}
    assert verdict.exit_code is ExitCode.VALID
    assert {check.name for check in verdict.checks} == {
        "run_complete", "balancer", "call_order", "stream_join", "exactly_once", "attestation", "equality",
        "statistics", "agreement", "effect", "balancedness", "leaks",
    }  # fmt: skip
    assert Verdict.from_json(verdict.to_json()) == verdict


def _set(row: str, **fields: Any) -> Callable[[dict[str, Any]], Damage]:
    return lambda where: lambda run: for_all(run.find(row, **where), lambda found: found.update(fields))


def _move_count(row: RowDict, name: str) -> None:
    """One entry less in the first nonempty place and one more in the next."""
    at = next(i for i, value in enumerate(row[name]) if value)
    row[name][at] -= 1
    row[name][(at + 1) % len(row[name])] += 1


def _drop_call(kind: Kind) -> Damage:
    def damage(run: RunBuilder) -> None:
        (gone,) = run.find_records(kind, host=True, rank=1, layer=0, iteration=2)
        run.records.remove(gone)

    return damage


def _shift(kind: Kind, end: str, by: int) -> Damage:
    def damage(run: RunBuilder) -> None:
        (record,) = run.find_records(kind, host=False, rank=1, layer=1, iteration=2)
        record[end] += by

    return damage


def _nothing_moves(run: RunBuilder) -> None:
    """A balancer that plans and commits, but always what is there already."""
    first = run.find("placement", iteration=0)[0]
    for_all(run.find("placement"), lambda row: row.update(digest=first["digest"], slots=first["slots"]))
    for name in ("plan", "commit"):
        for_all(run.find(name), lambda row: row.update(digest=first["digest"], changed=[]))
    for_all(run.find("commit"), lambda row: row.update(local_changed=[]))
    for_all([row for row in run.find("attest") if row["iteration"] >= 0], lambda row: row.update(changed_bytes=0))


def _other_slots(run: RunBuilder, since: int = 2) -> None:
    """The tables are not the committed ones, on all ranks alike: ranks have changed places, which balances equally."""
    slots = list(reversed(run.find("placement", rank=0, layer=1, iteration=2)[0]["slots"]))
    rows = [row for row in run.find("placement", layer=1) if row["iteration"] >= since]
    for_all(rows, lambda row: row.update(slots=slots, digest=digest(np.array(slots))))


INVALID: dict[str, tuple[str, Damage]] = {
    "too few iterations": ("run_complete", _set("end", iterations=3)({"rank": 1})),
    **{f"a rank began with other {name}": ("run_complete", _set("begin", **{name: 99})({"rank": 1}))
       for name in ("ranks", "layers", "experts", "slots", "top_k")},
    "the balancer is off on one rank": ("balancer", _set("begin", dynamic=False)({"rank": 1})),
    "a call is left out": ("call_order", _drop_call(Kind.DONE_WAIT_GPU_STAGE)),
    "an iteration is not ended": ("call_order", lambda run: run.records.remove(
        run.find_records(Kind.END_ITER, host=True, rank=0, iteration=1)[0])),
    "the last iteration is not ended": ("call_order", lambda run: run.records.remove(
        run.find_records(Kind.END_ITER, host=True, rank=0, iteration=3)[0])),
    "route begins before the wait ends": ("stream_join", _shift(Kind.START_WAIT_GPU_STAGE, "end", 60)),
    "experts begin before the wait ends": ("stream_join", _shift(Kind.EXPERTS, "start", -225)),
    "the hand-over begins before the experts end": ("stream_join", _shift(Kind.EXPERTS, "end", 11)),
    "the hand-over ends after done_set": ("stream_join", _shift(Kind.START_SET_CPU_STAGE, "end", 101)),
    "an entry is lost": ("exactly_once", _set("dispatch", once=11, missing=1)({"rank": 0, "iteration": 2, "layer": 1})),
    "an entry is computed twice": ("exactly_once", _set("dispatch", duplicated=1)({"rank": 1, "iteration": 0})),
    "an entry meets the wrong expert": ("exactly_once", _set("dispatch", wrong_expert=1)({"rank": 1, "iteration": 0})),
    "an entry names no slot": ("exactly_once", _set("dispatch", invalid_slot=1)({"rank": 1, "iteration": 0})),
    "entries are not looked at": ("exactly_once", _set("dispatch", expected=0, once=0)({"rank": 0, "iteration": 3})),
    "a slot holds other bytes": ("attestation", _set("attest", mismatched=[[4, 1, "ab"]])({"rank": 1, "iteration": 2})),
    "an output differs": ("equality", _set("equality", ratio=1e-3)({"rank": 1, "iteration": 3, "layer": 0})),
    "an output differs within what its own row allows": ("equality", _set("equality", ratio=1e-3, tolerance=1e-2)(
        {"rank": 1, "iteration": 3, "layer": 0})),
    "an output is not a number": ("equality", _set("equality", ratio=math.nan)({"rank": 1, "iteration": 3})),
    "a ratio is below nothing": ("equality", _set("equality", ratio=-1.0)({"rank": 1, "iteration": 3})),
    "a token is counted for another expert": ("statistics", lambda run: _move_count(
        run.find("routed", rank=0, layer=1, iteration=2)[0], "counts")),
    "a rank reduced fewer experts": ("statistics", lambda run: (
        run.find("routed", rank=0, layer=1, iteration=2)[0]["counts"].append(0),
        run.find("routed", rank=1, layer=1, iteration=2)[0]["counts"].append(0))),
    "a rank routes by another placement": ("agreement", lambda run: for_all(
        run.find("placement", rank=1, layer=0, iteration=2), lambda row: row.update(
            digest=1, slots=run.find("placement", rank=1, layer=0, iteration=1)[0]["slots"]))),
    "the ranks planned differently": ("agreement", lambda run: run.add(
        "dropped", 1, 0, 3, due=9, ready=2, ranks=2, digests_differ=True, reason="digests")),
    "a committed plan was dropped": ("effect", lambda run: run.add(
        "dropped", 1, 0, 2, due=3, ready=1, ranks=2, digests_differ=False, reason="late")),
    "a slot gets other entries than the rule gives": ("effect", lambda run: _move_count(
        run.find("received", rank=1, layer=0, iteration=1)[0], "slots")),
    "a scheduled update has no plan": ("effect", lambda run: run.remove("plan", layer=1, rank=0)),
    "a plan names another placement than its commit": ("effect", _set("plan", digest=5)({"layer": 1})),
    "a plan is not in the schedule": ("effect", lambda run: run.add(
        "plan", 0, 1, 0, taken=0, due=1, digest=1, changed=[], bytes=0, predicted=[1.0, 1.0])),
    "a plan is made from a load that has decayed otherwise": ("effect", lambda run: run.scenario["balancer"].update(
        decay=0.1)),
    "a plan predicts other loads": ("effect", _set("plan", predicted=[1.0, 1.0])({"rank": 1, "layer": 1})),
    "a commit moves other bytes than its slots hold": ("effect", _set("commit", bytes=1)({"rank": 1, "layer": 1})),
    "a commit copied less than it moved": ("effect", _set("commit", sources={"host": 1})({"rank": 1, "layer": 1})),
    "weights came from elsewhere than the scenario wants": ("effect", lambda run: for_all(
        run.find("commit", rank=1), lambda row: row.update(sources={"peer": row["bytes"]}))),
    "weights that were to come from peers came from the host": ("effect", lambda run: run.scenario["balancer"].update(
        state="device", weights_from="peer")),
    "bytes stay the same under a commit": ("effect", _set("attest", changed_bytes=0)({"rank": 1, "iteration": 2})),
    "bytes change without a commit": ("effect", _set("attest", changed_bytes=1)(
        {"rank": 1, "layer": 1, "iteration": 3})),
    "a rank changes other slots than planned": ("effect", _set("commit", local_changed=[1])({"rank": 1, "layer": 1})),
    "the tables are others than the committed ones": ("effect", _other_slots),
    "the tables change without a commit": ("effect", lambda run: _other_slots(run, 3)),
    "the commit names other slots than the tables show": ("effect", lambda run: (
        for_all(run.find("commit", layer=1), lambda row: row.update(changed=[1, 4], local_changed=[1])),
        for_all(run.find("plan", layer=1), lambda row: row.update(changed=[1, 4])),
        for_all(run.find("attest", layer=1, iteration=2), lambda row: row.update(changed_bytes=1)))),
    "the balancer reports another balancedness": ("balancedness", lambda run: for_all(
        run.find("balance", rank=1, layer=1, iteration=3), lambda row: row.update(value=row["value"] + 1e-4))),
    "a thread is left": ("leaks", _set("leak", threads=["updater"])({"rank": 1})),
    "a segment is left": ("leaks", _set("leak", segments=["x"])({"rank": 1})),
    "work is left": ("leaks", _set("leak", pending=2)({"rank": 1})),
    "a balancer is left": ("leaks", _set("leak", balancer=True)({"rank": 1})),
}  # fmt: skip


@pytest.mark.parametrize("what", INVALID)
def test_one_damage_makes_one_check_invalid(what: str, tmp_path: Path) -> None:
    name, damage = INVALID[what]
    run = good_run()
    damage(run)
    verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == {name: "invalid"}
    (bad,) = [check for check in verdict.checks if check.name == name]
    assert bad.detail
    assert verdict.exit_code is ExitCode.INVALID


@pytest.mark.parametrize("kind", [kind.value for kind in Row if good_run().find(kind.value) and kind is not Row.ATTEST])
def test_a_second_row_of_one_place_does_not_hide_the_first(kind: str, tmp_path: Path) -> None:
    run = good_run()
    row = run.find(kind, rank=1)[-1]
    run.rows.insert(run.rows.index(row), dict(row))
    verdict = judge(run.write(tmp_path))
    checks = ["run_complete", "effect"] if kind == "placement" else ["run_complete"]
    assert [name for name, status in _bad(verdict).items() if status == "invalid"] == checks
    assert f"rank 1 left more than one {kind} row" in verdict.checks[0].detail


def test_a_second_row_of_one_call_does_not_hide_the_first(tmp_path: Path) -> None:
    run = scripted_run(CALLS, [None] * 3, KINDS)
    run.rows.insert(0, run.find("call", index=1)[0] | {"error": ERROR})
    assert _bad(judge(run.write(tmp_path))) == {"run_complete": "invalid"}


def test_a_drawn_workload_must_be_the_one_that_was_routed(tmp_path: Path) -> None:
    run = good_run(workload={"kind": "zipf", "tokens_per_rank": TOKENS})
    scenario = scenarios.loads(yaml.safe_dump(run.scenario), "miniature")
    for row in run.find("routed"):
        ids = workload.topk_ids(scenario, row["iteration"], row["layer"], row["rank"])
        row["counts"] = np.bincount(ids.reshape(-1), minlength=EXPERTS).tolist()
    run_complete = judge(run.write(tmp_path / "asked")).checks[0]
    assert (run_complete.name, run_complete.status) == ("run_complete", Status.VALID)
    _move_count(run.find("routed", rank=1, layer=0, iteration=2)[0], "counts")
    run_complete = judge(run.write(tmp_path / "other")).checks[0]
    assert run_complete.status is Status.INVALID
    assert "the scenario asks for" in run_complete.detail


def test_a_balancer_that_moves_nothing_is_invalid(tmp_path: Path) -> None:
    run = good_run()
    _nothing_moves(run)
    effect = next(check for check in judge(run.write(tmp_path)).checks if check.name == "effect")
    assert effect.status is Status.INVALID
    assert effect.detail.startswith("not a single slot was moved in the whole run")


def test_a_balancer_that_had_nothing_to_move_is_unknown(tmp_path: Path) -> None:
    run = good_run()
    _nothing_moves(run)
    slots = np.array(run.find("placement", layer=0, iteration=0)[0]["slots"])
    counts = np.bincount(slots, minlength=EXPERTS)  # as many entries as replicas: every slot has the same load
    for_all(run.find("reduced"), lambda row: row.update(counts=counts.tolist()))
    run.scenario["balancer"]["policy"] = "incremental"
    predicted = [PER_RANK * 1.0] * 2
    for_all(run.find("plan", taken=0), lambda row: row.update(predicted=predicted))
    for_all(run.find("plan", taken=1), lambda row: row.update(predicted=[load * (1 + DECAY) for load in predicted]))
    for_all(run.find("plan", taken=2), lambda row: row.update(predicted=[load * (1 + DECAY) for load in predicted]))
    for_all(run.find("commit"), lambda row: row.update(bytes=0, sources={}))
    effect = next(check for check in judge(run.write(tmp_path)).checks if check.name == "effect")
    assert effect.status is Status.UNKNOWN
    assert effect.detail.startswith("nothing had to move: none of 3 plans changes a slot")


def test_a_balancer_that_moved_nothing_for_unknown_loads_is_unknown(tmp_path: Path) -> None:
    run = good_run()
    _nothing_moves(run)
    for_all(run.find("commit"), lambda row: row.update(bytes=0, sources={}))
    run.remove("reduced")
    effect = next(check for check in judge(run.write(tmp_path)).checks if check.name == "effect")
    assert effect.status is Status.UNKNOWN


def test_a_run_that_died_before_its_first_move_is_unknown(tmp_path: Path) -> None:
    run = good_run()
    run.rows = run.find("begin")
    run.meta |= {"state": "failed", "failure": "rank 1 was killed by SIGKILL"}
    effect = next(check for check in judge(run.write(tmp_path)).checks if check.name == "effect")
    assert effect.status is Status.UNKNOWN


def test_a_commit_on_one_rank_alone_is_invalid(tmp_path: Path) -> None:
    run = good_run()
    run.remove("commit", rank=1, layer=0, iteration=3)
    assert _bad(judge(run.write(tmp_path))) == {"agreement": "invalid", "effect": "invalid"}


def test_a_dropped_plan_is_invalid_and_says_why(tmp_path: Path) -> None:
    run = good_run()
    run.remove("plan", layer=0, due=3)
    for rank in range(2):
        run.add("dropped", rank, 0, 3, due=3, ready=1, ranks=2, digests_differ=False, reason="rank 1 was late")
    effect = next(check for check in judge(run.write(tmp_path)).checks if check.name == "effect")
    assert effect.status is Status.INVALID
    assert "rank 1 was late" in effect.detail


SHARED = {"shared_ratio": 1e-7, "shared_tokens": TOKENS, "block_ratio": 1e-7, "block_tokens": TOKENS}


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        (SHARED, {}),
        (SHARED | {"shared_ratio": 1e-3}, {"equality": "invalid"}),
        (SHARED | {"block_ratio": 1e-3}, {"equality": "invalid"}),
        (SHARED | {"shared_tokens": 0}, {"equality": "unknown"}),
        (SHARED | {"block_tokens": 0}, {"equality": "unknown"}),
        ({"shared_ratio": 1e-7, "shared_tokens": TOKENS}, {"equality": "unknown"}),
    ],
)
def test_a_shared_expert_is_compared_alone_and_in_the_sum(fields: RowDict, bad: dict[str, str], tmp_path: Path) -> None:
    run = good_run()
    run.scenario["model"]["shared_intermediate"] = 4
    for_all(run.find("equality"), lambda row: row.update(fields))
    assert _bad(judge(run.write(tmp_path))) == bad


UNKNOWN: dict[str, tuple[set[str], Damage]] = {
    "a rank did not end": ({"run_complete"}, lambda run: run.remove("end", rank=1)),
    "a rank did not begin": ({"run_complete", "balancer"}, lambda run: run.remove("begin", rank=1)),
    "a layer of an iteration is not seen": ({"run_complete", "statistics"}, lambda run: run.remove(
        "routed", rank=1, layer=0, iteration=2)),
    "records were dropped": ({"call_order", "stream_join"}, lambda run: run.dropped.update({1: 5})),
    "a log was not closed": ({"call_order", "stream_join"}, lambda run: run.not_closed.add(0)),
    "a device record is missing": ({"stream_join"}, lambda run: run.records.remove(
        run.find_records(Kind.EXPERTS, host=False, rank=0, layer=0, iteration=1)[0])),
    "no dispatch evidence of a rank": ({"exactly_once"}, lambda run: run.remove("dispatch", rank=0, iteration=1)),
    "a commit was not attested": ({"attestation", "effect"}, lambda run: run.remove("attest", rank=0, iteration=1)),
    "a rank's outputs were not compared": ({"equality"}, lambda run: run.remove("equality", rank=1)),
    "a layer's outputs were not compared": ({"equality"}, lambda run: run.remove("equality", layer=1)),
    "some tokens were not compared": ({"equality"}, _set("equality", tokens=1)({"rank": 0})),
    "a slot was not attested": ({"attestation"}, _set("attest", slots=2)({"rank": 1})),
    "slots were not attested at the start": ({"attestation"}, lambda run: run.remove("attest", rank=1, iteration=-1)),
    "slots were not attested at the end": ({"attestation"}, lambda run: run.remove(
        "attest", rank=1, layer=1, iteration=3)),
    "the log was full in mid-iteration": ({"call_order", "stream_join"}, lambda run: (
        run.dropped.update({0: 1}), run.records.remove(
            run.find_records(Kind.END_ITER, host=True, rank=0, iteration=3)[0]))),
    "nothing was compared": ({"equality"}, lambda run: run.remove("equality")),
    "only empty outputs were compared": ({"equality"}, _set("equality", tokens=0)({})),
    "no reduced counts": ({"statistics", "balancedness", "effect"}, lambda run: run.remove("reduced", iteration=1)),
    "no placement": ({"agreement", "effect", "balancedness"}, lambda run: run.remove("placement", iteration=3)),
    "no received counts": ({"effect"}, lambda run: run.remove("received", rank=1, layer=1, iteration=1)),
    "no expected counts": ({"effect"}, lambda run: run.remove("expected", rank=1, layer=1, iteration=1)),
    "no balancedness reported": ({"balancedness"}, lambda run: run.remove("balance", rank=0, iteration=0)),
    "nobody looked for leaks": ({"leaks"}, lambda run: run.remove("leak", rank=0)),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_was_not_observed_is_unknown(what: str, tmp_path: Path) -> None:
    names, damage = UNKNOWN[what]
    run = good_run()
    damage(run)
    verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == dict.fromkeys(names, "unknown")
    assert verdict.exit_code is ExitCode.UNKNOWN


def test_without_a_trace_the_order_is_unknown(tmp_path: Path) -> None:
    good_run(checks={"thresholds": {"overlap.balancer": "> 0"}}).write(tmp_path)
    (tmp_path / "trace.sqlite").unlink()
    unknown = ("call_order", "stream_join", "threshold overlap.balancer")
    assert _bad(judge(tmp_path)) == dict.fromkeys(unknown, "unknown")


def test_a_rank_that_recorded_nothing_is_unknown(tmp_path: Path) -> None:
    run = good_run()
    run.records = [record for record in run.records if record["rank"] == 0 or record["stream"] != HOST]
    assert _bad(judge(run.write(tmp_path))) == dict.fromkeys(("call_order", "stream_join"), "unknown")


def test_a_judge_that_fails_is_an_unknown_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = good_run()
    for row in run.find("dispatch", rank=0, layer=0, iteration=0):
        del row["once"]
    with caplog.at_level(logging.ERROR):
        verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == {"exactly_once": "unknown"}
    check = next(check for check in verdict.checks if check.name == "exactly_once")
    assert check.detail == "KeyError: 'once'"
    assert "exactly_once" in caplog.text


def test_metrics_that_fail_leave_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = good_run(checks={"thresholds": {"commits": ">= 1"}})
    for row in run.find("commit"):
        del row["bytes"]
    with caplog.at_level(logging.ERROR):
        verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == dict.fromkeys(("effect", "threshold commits"), "unknown")
    assert any(note.startswith("no metrics: KeyError") for note in verdict.notes)


def test_switched_off_checks_are_left_out_and_named(tmp_path: Path) -> None:
    run = good_run(checks={"equality": False, "attestation": False})
    run.remove("equality")
    run.remove("attest")
    verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == {}
    assert "equality" not in {check.name for check in verdict.checks}
    assert "check equality is switched off in the scenario" in verdict.notes


def test_a_static_run_says_that_the_balancer_is_off(tmp_path: Path) -> None:
    run = good_run(balancer={"slots_per_rank": PER_RANK})
    for name in ("plan", "commit", "reduced", "balance"):
        run.remove(name)
    for_all(run.find("begin"), lambda row: row.update(dynamic=False, off="static routing: layer_updates_per_iter is 0"))
    run.records.clear()
    verdict = judge(run.write(tmp_path))
    assert _bad(verdict) == {}
    names = {check.name for check in verdict.checks}
    assert names == {
        "run_complete",
        "balancer",
        "stream_join",
        "exactly_once",
        "attestation",
        "equality",
        "effect",
        "leaks",
    }
    assert "balancer: off, because static routing: layer_updates_per_iter is 0" in verdict.notes
    assert "check statistics does not apply: no expert moves in this run" in verdict.notes


@pytest.mark.parametrize(
    ("execution", "delay", "waits"), [("graph", 1, True), ("eager", 1, False), ("graph", 2, False)]
)
def test_a_gpu_that_waits_inside_graphs_for_plans_is_told_of(
    execution: str, delay: int, waits: bool, tmp_path: Path
) -> None:
    run = good_run(device="cuda", execution=execution)
    run.scenario["balancer"] |= {"state": "device", "commit_delay": delay}
    run.scenario["model"] |= {"dtype": "bfloat16", "hidden": 8, "intermediate": 8}
    notes = judge(run.write(tmp_path)).notes
    assert any(note.startswith("balancer.commit_delay 1 in graphs") for note in notes) is waits


def test_a_balancer_that_is_off_without_the_scenario_saying_so_is_invalid(tmp_path: Path) -> None:
    run = good_run()
    for_all(run.find("begin"), lambda row: row.update(dynamic=False, off="one rank"))
    check = next(check for check in judge(run.write(tmp_path)).checks if check.name == "balancer")
    assert check.status is Status.INVALID
    assert "off, because one rank" in check.detail


THRESHOLDS = {
    "overlap.balancer": ("p50 >= 0.6", Status.VALID),
    "overlap.reduction": ("> 0.6", Status.INVALID),
    "commits": ("== 3", Status.VALID),
    "moves.slots": ("< 7", Status.INVALID),
    "stall.p50_us": ("< 1", Status.UNKNOWN),
}


@pytest.mark.parametrize("metric", THRESHOLDS)
def test_thresholds_are_checks(metric: str, tmp_path: Path) -> None:
    text, status = THRESHOLDS[metric]
    verdict = judge(good_run(checks={"thresholds": {metric: text}}).write(tmp_path))
    check = next(check for check in verdict.checks if check.name == f"threshold {metric}")
    assert check.status is status


def test_a_failed_run_has_its_failure_in_the_verdict(tmp_path: Path) -> None:
    run = good_run()
    run.meta |= {"state": "failed", "failure": "rank 1 was killed by SIGKILL"}
    verdict = judge(run.write(tmp_path))
    assert verdict.failure == "rank 1 was killed by SIGKILL"
    assert verdict.exit_code is ExitCode.FAILED
    run.meta = {"state": "running", "failure": ""}
    assert "did not finish" in judge(run.write(tmp_path)).failure


def test_what_a_run_that_was_cut_short_did_not_reach_is_unknown(tmp_path: Path) -> None:
    run = good_run()
    run.records.remove(run.find_records(Kind.END_ITER, host=True, rank=0, iteration=3)[0])
    run.remove("commit", rank=0, iteration=3)
    status = {check.name: check.status for check in judge(run.write(tmp_path)).checks}
    assert (status["call_order"], status["effect"]) == (Status.INVALID, Status.INVALID)
    run.meta |= {"state": "failed", "failure": "rank 1 was killed by SIGKILL"}
    status = {check.name: check.status for check in judge(run.write(tmp_path)).checks}
    assert status["call_order"] is Status.UNKNOWN


CALLS: list[Any] = ["start_iter", "start_wait_gpu_stage", "done_wait_gpu_stage"]
KINDS = (Kind.START_ITER, Kind.START_WAIT_GPU_STAGE, Kind.DONE_WAIT_GPU_STAGE)
ERROR = {"code": "E104", "what": "layer 0: start_wait_gpu_stage twice"}
EXPECT = {"code": "E104", "at": 2, "contains": "twice"}


def test_legal_scripted_calls_are_valid(tmp_path: Path) -> None:
    verdict = judge(scripted_run(CALLS, [None] * 3, KINDS).write(tmp_path))
    assert _bad(verdict) == {}
    names = {check.name for check in verdict.checks}
    assert names == {"run_complete", "balancer", "expected_error", "call_order", "leaks"}


@pytest.mark.parametrize(
    ("errors", "status"),
    [
        ([None, None, ERROR], Status.VALID),
        ([None, ERROR], Status.INVALID),
        ([None, None, None], Status.INVALID),
        ([None, None, ERROR | {"code": "E105"}], Status.INVALID),
        ([None, None, ERROR | {"what": "another reason"}], Status.INVALID),
        ([ERROR, None, ERROR], Status.INVALID),
        ([], Status.UNKNOWN),
    ],
)
def test_the_expected_error_must_come_where_and_as_expected(
    errors: list[RowDict | None], status: Status, tmp_path: Path
) -> None:
    run = scripted_run(CALLS, errors, KINDS, expect_error=EXPECT, checks={"call_order": False})
    check = next(check for check in judge(run.write(tmp_path)).checks if check.name == "expected_error")
    assert check.status is status


@pytest.mark.parametrize(("errors", "status"), [([None, ERROR], "invalid"), ([None, None], "unknown")])
def test_without_an_expected_error_every_call_must_be_made(errors: list[Any], status: str, tmp_path: Path) -> None:
    assert _bad(judge(scripted_run(CALLS, errors, KINDS).write(tmp_path))) == {"expected_error": status}


def test_no_evidence_at_all_is_never_a_pass(tmp_path: Path) -> None:
    run = good_run()
    run.rows.clear()
    run.records.clear()
    verdict = judge(run.write(tmp_path))
    assert Status.VALID not in {check.status for check in verdict.checks if check.name != "effect"}
    assert next(check for check in verdict.checks if check.name == "effect").status is Status.INVALID


def test_a_damaged_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E057"):
        judge(tmp_path / "absent")
    folder = good_run().write(tmp_path / "run")
    trace = (folder / "trace.sqlite").read_bytes()
    (folder / "trace.sqlite").write_bytes(trace[: len(trace) // 2])
    with pytest.raises(TraceError, match="E056"):
        judge(folder)
    (folder / "trace.sqlite").write_bytes(trace)
    evidence = folder / "evidence.rank1.jsonl"
    evidence.write_text(evidence.read_text().replace('{"row": "end"', '{"row" "end"'))
    with pytest.raises(TraceError, match="E050"):
        judge(folder)
