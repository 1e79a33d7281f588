"""Did the run happen as the scenario says: to its end, balancer on, with the expected error, leaving nothing."""

from __future__ import annotations

import numpy as np

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core import workload
from moe_eplb.core.evidence import Row
from moe_eplb.core.scenario import ExpectError, Scenario
from moe_eplb.core.verdict import CheckResult

__all__ = ["balancer", "expected_error", "leaks", "run_complete"]


def run_complete(folder: RunFolder) -> CheckResult:
    """Every rank began and ended, did all iterations, and left evidence of every layer in each."""
    findings = Findings("run_complete", f"{len(folder.ranks)} ranks, {folder.scenario.iterations} iterations")
    began = {row["rank"]: row for row in folder.evidence.rows(Row.BEGIN)}
    ends = {row["rank"]: row for row in folder.evidence.rows(Row.END)}
    findings.need_ranks("begin", folder, began)
    findings.need_ranks("end", folder, ends)
    _one_row_each(folder, findings)
    _began_as_asked(folder.scenario, began, findings)
    if not folder.scripted:
        _all_iterations(folder, ends, findings)
        routed = folder.evidence.by_place(Row.ROUTED)
        for place in folder.places:
            findings.need_ranks("routed", folder, routed.get(place, {}), place)
            for rank, row in routed.get(place, {}).items():
                _routes_workload(folder, place, rank, row, findings)
    iterations = sorted({row["iterations"] for row in ends.values()})
    return findings.result(f"{len(ends)} ranks ended, iterations {', '.join(map(str, iterations)) or 'none'}")


def _one_row_each(folder: RunFolder, findings: Findings) -> None:
    """Of two rows of one place the judges would see one, and the other could say anything."""
    for kind in Row:
        for place, rank in folder.evidence.repeated(kind):
            findings.wrong(f"rank {rank} left more than one {kind.value} row", place if place.layer >= 0 else "")


def _began_as_asked(scenario: Scenario, began: dict[int, EvidenceRow], findings: Findings) -> None:
    """The sizes that ranks began with are the scenario's."""
    model = scenario.model
    asked = {"ranks": scenario.ranks, "layers": model.layers, "experts": model.experts}
    asked |= {"slots": scenario.slots, "top_k": model.top_k}
    for rank, row in began.items():
        for name, size in asked.items():
            if row[name] != size:
                findings.wrong(f"rank {rank} began with {name} {row[name]}, the scenario says {size}")


def _routes_workload(folder: RunFolder, place: Place, rank: int, row: EvidenceRow, findings: Findings) -> None:
    """A drawn workload can be drawn again: what the layer routed is what the scenario asks for."""
    if workload.is_drawn(folder.scenario):
        asked = _asked(folder.scenario, place, rank)
        if row["counts"] != asked:
            findings.wrong(f"rank {rank} routed {row['counts']} by expert, the scenario asks for {asked}", place)


def _asked(scenario: Scenario, place: Place, rank: int) -> list[int]:
    """Entries by expert of all runs of the layer in the iteration."""
    counts = np.zeros(scenario.model.experts, dtype=np.int64)
    for repeat in range(scenario.model.repeats(place.layer)):
        ids = workload.topk_ids(scenario, place.iteration, place.layer, rank, repeat)
        assert ids is not None, "a drawn workload has ids"
        counts += np.bincount(ids.reshape(-1), minlength=scenario.model.experts)
    asked: list[int] = counts.tolist()
    return asked


def _all_iterations(folder: RunFolder, ends: dict[int, EvidenceRow], findings: Findings) -> None:
    for rank, row in ends.items():
        if row["iterations"] != folder.scenario.iterations:
            findings.wrong(f"rank {rank} did {row['iterations']} of {folder.scenario.iterations} iterations")


def balancer(folder: RunFolder) -> CheckResult:
    """The balancer is on exactly where the scenario says so."""
    reason = folder.scenario.balancer_off_reason()
    findings = Findings("balancer", "on" if reason is None else f"off, because {reason}")
    rows = {row["rank"]: row for row in folder.evidence.rows(Row.BEGIN)}
    findings.need_ranks("begin", folder, rows)
    for rank, row in rows.items():
        is_on = bool(row["dynamic"]) and not row["off"]
        if is_on != (reason is None):
            findings.wrong(f"rank {rank}: {_state(row)}")
    seen = sorted({_state(row) for row in rows.values()})
    return findings.result("; ".join(seen) or "nothing")


def _state(row: EvidenceRow) -> str:
    if row["off"]:
        return f"balancer: off, because {row['off']}"
    return "balancer: on" if row["dynamic"] else "balancer: off, without a reason"


def leaks(folder: RunFolder) -> CheckResult:
    """After the run no thread, segment, queued work or balancer is left (`call_order` sees open iterations)."""
    findings = Findings("leaks", "nothing left behind on any rank")
    rows = {row["rank"]: row for row in folder.evidence.rows(Row.LEAK)}
    findings.need_ranks("leak", folder, rows)
    for rank, row in rows.items():
        for what in ("threads", "segments", "pending", "balancer"):
            if row[what]:
                findings.wrong(f"rank {rank} left {what}: {row[what]}")
    return findings.result(f"{len(rows)} ranks looked at")


def expected_error(folder: RunFolder) -> CheckResult:
    """The calls end in the expected error at the expected index on every rank, or in none."""
    expect = folder.scenario.expect_error
    findings = Findings("expected_error", _described(expect))
    calls: dict[int, dict[int, EvidenceRow]] = {rank: {} for rank in folder.ranks}
    for row in folder.evidence.rows(Row.CALL):
        calls[row["rank"]][row["index"]] = row
    for rank, rows in calls.items():
        if expect is None:
            _judge_clean_calls(folder, rank, rows, findings)
        else:
            _judge_expected(expect, rank, rows, findings)
    errors = sorted({f"{r['error']['code']} at call {i}" for m in calls.values() for i, r in m.items() if r["error"]})
    return findings.result("; ".join(errors) or f"no error in {sum(map(len, calls.values()))} calls")


def _described(expect: ExpectError | None) -> str:
    if expect is None:
        return "no error"
    at = "" if expect.at is None else f" at call {expect.at}"
    return f"{expect.code}{at}" + (f" saying {expect.contains!r}" if expect.contains else "") + " on every rank"


def _judge_clean_calls(folder: RunFolder, rank: int, rows: dict[int, EvidenceRow], findings: Findings) -> None:
    for index in range(len(folder.scenario.calls or ())):
        if index not in rows:
            findings.missing(f"rank {rank}: call {index} was not made")
        elif rows[index]["error"]:
            findings.wrong(f"rank {rank}: {_said(rows[index])}", f"call {index}")


def _judge_expected(expect: ExpectError, rank: int, rows: dict[int, EvidenceRow], findings: Findings) -> None:
    failed = [row for _, row in sorted(rows.items()) if row["error"]]
    if not rows:
        findings.missing(f"rank {rank} left no call rows")
    elif not failed:
        findings.wrong(f"rank {rank}: {len(rows)} calls without an error")
    else:
        first = failed[0]
        right_place = expect.at is None or first["index"] == expect.at
        if not right_place or first["error"]["code"] != expect.code or expect.contains not in first["error"]["what"]:
            findings.wrong(f"rank {rank}: {_said(first)}", f"call {first['index']}")
        for other in failed[1:]:
            findings.wrong(f"rank {rank}: a second error: {_said(other)}", f"call {other['index']}")


def _said(row: EvidenceRow) -> str:
    return f"{row['error']['code']} at call {row['index']} ({row['call']}): {row['error']['what']}"
