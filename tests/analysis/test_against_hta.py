"""Our overlap of communication with its waits, to the nanosecond against HolisticTraceAnalysis 0.5.0.

What it computes (`get_comm_comp_overlap`): of each rank the kernels whose name fits ``^nccl.*Kernel`` are merged to
disjoint intervals, waits included, and so is everything else that has a stream and is no copy, fill or synchronisation;
the share of the first that the second covers is rounded to two digits of percent. That is our pair
`communication_waits` as long as communication and compute share no stream. Two things of it are set aside here: the
rounding, and that it cuts fractional times to whole microseconds (``HTA_DISABLE_NS_ROUNDING=1`` turns that off).

The table of its answers is made by `benchmarks.hta_overlap`, since an installation takes 500 MB; with EPLB_HTA_PYTHON
naming an interpreter that has it, the table is held against the program itself.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.hta_overlap import TABLE, made_traces, run_hta
from moe_eplb.analysis.capture import ROLES, Capture, role_codes
from moe_eplb.analysis.collectives import straggling
from moe_eplb.analysis.overlap import PAIRS, Hidden, measure
from moe_eplb.analysis.ranges import project
from moe_eplb.analysis.readers.any import read_capture, read_captures
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.core.events import Role
from tests.analysis.profiler_traces import (
    ACTIVATION,
    ATTENTION,
    BACKWARD_THREAD,
    CACHED_NOTIFY,
    COMBINE,
    COMM,
    DISPATCH,
    GROUPED,
    LAYOUT,
    NOTIFY,
    ProfilerTrace,
    expert_parallel,
)  # fmt: skip

HTA_PYTHON = os.environ.get("EPLB_HTA_PYTHON", "")
EXPERT_PARALLEL = "expert parallel"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def _prepared(made: ProfilerTrace, folder: Path) -> Capture:
    return prepare(read_capture(made.write(folder / f"{made.rank}.json.gz")))


def _ours(made: ProfilerTrace, folder: Path) -> Hidden:
    return measure(work_of_capture(_prepared(made, folder)), PAIRS["communication_waits"]).whole


def test_every_number_of_the_table_is_ours_too(tmp_path: Path) -> None:
    made, answers, compared = made_traces(), _table()["answers"], 0
    assert set(made) == set(answers)
    for name, ranks in made.items():
        assert {str(one.rank) for one in ranks} == set(answers[name])
        for one in ranks if name != EXPERT_PARALLEL else ():
            theirs, ours = answers[name][str(one.rank)], _ours(one, tmp_path)
            assert (ours.total, ours.hidden) == (theirs["communication_ns"], theirs["hidden_ns"]), (name, one.rank)
            assert ours.overlap is not None
            assert math.isclose(100 * ours.overlap, theirs["percent"], abs_tol=0.0051)
            compared += 0 < ours.hidden < ours.total
    assert compared > 150


def test_ranks_read_together_have_the_same_numbers(tmp_path: Path) -> None:
    ranks = made_traces()["three decimals 7"]
    paths = [one.write(tmp_path / f"{one.rank}.json") for one in ranks]
    found = measure(work_of_capture(prepare(read_captures(paths))), PAIRS["communication_waits"]).ranks
    expected = _table()["answers"]["three decimals 7"]
    assert {str(rank): hidden.hidden for rank, hidden in found.items()} == {
        rank: answer["hidden_ns"] for rank, answer in expected.items()
    }


@pytest.mark.skipif(not HTA_PYTHON, reason="EPLB_HTA_PYTHON names no interpreter with HolisticTraceAnalysis")
@pytest.mark.timeout(600)
def test_the_table_is_what_the_program_says() -> None:
    found = run_hta(HTA_PYTHON, made_traces())
    assert found["versions"]["HolisticTraceAnalysis"] == "0.5.0"
    assert found["answers"] == _table()["answers"]


# -- expert parallelism --------------------------------------------------------------------------------------------

_ROLE_OF = {
    ATTENTION: Role.COMPUTE, GROUPED: Role.COMPUTE, ACTIVATION: Role.COMPUTE, LAYOUT: Role.OTHER,
    NOTIFY: Role.COMM_WAIT, CACHED_NOTIFY: Role.COMM_WAIT, DISPATCH: Role.COMM, COMBINE: Role.COMM,
}  # fmt: skip


def test_the_other_tool_has_no_number_for_expert_parallel_traces() -> None:
    for answer in _table()["answers"][EXPERT_PARALLEL].values():
        assert answer == {"percent": None, "communication_ns": 0, "hidden_ns": None}


def test_every_kernel_of_an_expert_parallel_trace_is_classified(tmp_path: Path) -> None:
    for rank in range(2):
        made = expert_parallel(rank)
        assert {type(event["ts"]) for event in made.events} == {int}
        capture = _prepared(made, tmp_path)
        kernels = sum(event["cat"] == "kernel" for event in made.events)
        named = [capture.names[name] for name in capture.gpu["name"]]
        assert len(named) == kernels
        assert [ROLES[role] for role in capture.gpu["role"]] == [_ROLE_OF[name] for name in named]
        assert {_ROLE_OF[name] for name in named} == {Role.COMPUTE, Role.COMM, Role.COMM_WAIT, Role.OTHER}
        on_comm = {name for name, stream in zip(named, capture.gpu["stream"], strict=True) if stream == COMM}
        assert on_comm == {NOTIFY, CACHED_NOTIFY, DISPATCH, COMBINE}


def test_nothing_of_an_expert_parallel_trace_reads_nan_or_none(tmp_path: Path) -> None:
    paths = [expert_parallel(rank).write(tmp_path / f"{rank}.json.gz") for rank in range(2)]
    capture = prepare(read_captures(paths))
    report = make_trace_report(capture)
    assert report.unknown == ()
    assert report.iterations == (0, 1)
    assert report.layers == (0, 1, 2)
    for name in ("communication", "communication_waits"):
        pair = report.pairs[name]
        parts = [pair.whole, *pair.ranks.values(), *pair.iterations.values(), *pair.layers.values()]
        assert len(parts) == 1 + 2 + 2 + 3
        for part in parts:
            assert part.overlap is not None
            assert 0 < part.overlap < 1
    assert {one.name for one in report.collectives} == {DISPATCH, COMBINE, NOTIFY, CACHED_NOTIFY}
    stragglers = straggling(capture)
    communication = np.isin(capture.gpu["role"], role_codes((Role.COMM, Role.COMM_WAIT)))
    assert len(stragglers.name) == communication.sum() // 2
    assert all(math.isfinite(value) and value >= 1 for value in stragglers.imbalance.tolist())
    assert report.path is not None
    assert report.path.balancer_share == 0
    assert report.path.waits_known


def test_backward_kernels_lie_in_the_ranges_of_their_layers(tmp_path: Path) -> None:
    made = expert_parallel(layers=3, steps=2)
    capture = _prepared(made, tmp_path)
    by_correlation = {event["args"]["correlation"]: event for event in made.events if event["cat"] == "cuda_runtime"}
    ranges = [event for event in made.events if event["name"].startswith("layer.")]
    backward = 0
    for row in capture.gpu:
        call = by_correlation[int(row["correlation"])]
        (around,) = (r for r in ranges if r["tid"] == call["tid"] and r["ts"] <= call["ts"] < r["ts"] + r["dur"])
        assert row["layer"] == int(around["name"].removeprefix("layer."))
        backward += call["tid"] == BACKWARD_THREAD
    assert backward == len(capture.gpu) // 2
    own = {one.name: one.events for one in project(capture)}
    assert all(own[f"user_annotation:layer.{layer}"] == len(capture.gpu) // 3 for layer in range(3))
