"""Overlap on captures, against counting every nanosecond."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import intervals
from moe_eplb.analysis.capture import UPDATER_WORK, Capture
from moe_eplb.analysis.exposed import exposed_times, largest_exposed
from moe_eplb.analysis.overlap import PAIRS, Hidden, Pair, measure
from moe_eplb.analysis.ranges import Launches
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.readers.records import capture_of
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.stall import main_stall
from moe_eplb.analysis.trace import read_trace
from moe_eplb.analysis.work import main_streams, work_of_capture
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture
from tests.analysis.profiler_traces import expert_parallel
from tests.support.run_folders import good_run

_ROLES = st.sampled_from(
    [Role.COMPUTE, Role.COMPUTE, Role.COMM, Role.COMM_WAIT, Role.EPLB_STATISTIC, Role.EPLB_MIGRATE, Role.EPLB_WAIT,
     Role.EPLB_ALLREDUCE, Role.MEMCPY, Role.UNKNOWN]
)  # fmt: skip
_EVENT = st.tuples(
    _ROLES, st.integers(0, 60), st.integers(0, 25), st.sampled_from([7, 7, 20, 21]), st.sampled_from([0, 0, 1, 2]),
    st.integers(-1, 2), st.integers(-1, 1), st.sampled_from([False, False, True]), st.booleans(),
)  # fmt: skip
Event = tuple[Role, int, int, int, int, int, int, bool, bool]
"""Role, start, length, stream, GPU, iteration, layer, whether it is the updater's, whether it is selected."""
GPUS = ((0, 0), (1, 0), (1, 1))
"""(rank, device): two of them are one rank's."""


def _capture(events: list[Event], shift: int) -> Capture:
    made = MakeCapture()
    for rank, device in GPUS:
        made.stream(7, "Main", rank, device)
    for role, start, length, stream, gpu, iteration, layer, updater, selected in events:
        kind = UPDATER_WORK if updater else 0
        at = shift + start
        where = {"rank": GPUS[gpu][0], "device": GPUS[gpu][1], "bytes": int(selected)}
        made.gpu(role, at, at + length, stream, iteration=iteration, layer=layer, kind=kind, **where)
    return made.done()


Point = tuple[int, int, int]


def _points(capture: Capture, pair: Pair, mask: np.ndarray) -> tuple[set[Point], set[Point]]:
    """Every ns (rank, device, time) of B within a mask, and of it what C covers; each interval against each other."""
    gpu, total, hidden = capture.gpu, set(), set()
    roles = [list(Role)[code] for code in gpu["role"]]
    rows = list(zip(gpu.tolist(), roles, mask.tolist(), strict=True))
    names = gpu.dtype.names
    for b, b_role, wanted in rows:
        one = dict(zip(names, b, strict=True))
        if not wanted or b_role not in pair.hidden or (one["kind"] == UPDATER_WORK and not pair.updater):
            continue
        gpu_of = one["rank"], one["device"]
        total |= {(*gpu_of, t) for t in range(one["start"], one["end"])}
        for other, c_role, _ in rows:
            two = dict(zip(names, other, strict=True))
            if c_role not in pair.behind or two["kind"] == UPDATER_WORK or (two["rank"], two["device"]) != gpu_of:
                continue
            if two["stream"] != one["stream"] if pair.other_streams else two["stream"] == 7:
                common = range(max(one["start"], two["start"]), min(one["end"], two["end"]))
                hidden |= {(*gpu_of, t) for t in common}
    return total, hidden


def _naive(capture: Capture, pair: Pair, mask: np.ndarray) -> Hidden:
    total, hidden = _points(capture, pair, mask)
    return Hidden(len(total), len(hidden))


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=350, deadline=None)
@given(st.lists(_EVENT, max_size=12), st.sampled_from([0, 10**18, -(10**15)]))
def test_every_breakdown_is_what_counting_gives(name: str, events: list[Event], shift: int) -> None:
    capture, pair = _capture(events, shift), PAIRS[name]
    gpu = capture.gpu
    overlap = measure(work_of_capture(capture), pair)
    assert overlap.whole == _naive(capture, pair, np.ones(len(gpu), np.bool_))
    parts = (
        (overlap.cells, ("rank", "iteration", "layer")), (overlap.streams, ("rank", "stream")),
        (overlap.iterations, ("rank", "iteration")), ({(r,): hidden for r, hidden in overlap.ranks.items()}, ("rank",)),
    )  # fmt: skip
    for found, columns in parts:
        for key, hidden in found.items():
            mask = np.all([gpu[column] == value for column, value in zip(columns, key, strict=True)], axis=0)
            assert hidden == _naive(capture, pair, mask), (columns, key)


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=80, deadline=None)
@given(st.lists(_EVENT, max_size=12))
def test_a_selection_leaves_what_hides_it_as_it_is(name: str, events: list[Event]) -> None:
    capture, pair = _capture(events, 0), PAIRS[name]
    lasting = capture.gpu[capture.gpu["end"] > capture.gpu["start"]]
    selected = measure(work_of_capture(capture), pair, lasting["bytes"] == 1).whole
    assert selected == _naive(capture, pair, capture.gpu["bytes"] == 1)


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=100, deadline=None)
@given(st.lists(_EVENT, max_size=12), st.booleans())
def test_exposed_stretches_are_what_is_not_hidden(name: str, events: list[Event], some: bool) -> None:
    capture, pair = _capture(events, 0), PAIRS[name]
    chosen = capture.gpu["bytes"] == 1 if some else np.ones(len(capture.gpu), np.bool_)
    stretches = largest_exposed(capture, pair, most=100, only=chosen)
    assert [s.length for s in stretches] == sorted((s.length for s in stretches), reverse=True)
    covered = [(s.rank, s.device, t) for s in stretches for t in range(s.start, s.end)]
    assert len(covered) == len(set(covered))
    total, hidden = _points(capture, pair, chosen)
    assert set(covered) == total - hidden
    lasting = capture.gpu["end"] > capture.gpu["start"]
    assert len(covered) == measure(work_of_capture(capture), pair, chosen[lasting]).whole.exposed
    times = exposed_times(capture, pair, chosen)
    assert sum(intervals.length(of_gpu) for of_gpu in times.values()) == len(covered)
    assert all(sum(ns for _, ns in stretch.work) >= stretch.length for stretch in stretches)


def test_a_stretch_names_its_work_and_the_ranges_around_it(tmp_path: Path) -> None:
    capture = prepare(read_capture(expert_parallel().write(tmp_path / "t.json")))
    longest, *_ = largest_exposed(capture, PAIRS["communication"], 3)
    assert longest.length == max(end - start for _, start, end in _kernels(capture, "combine", "dispatch"))
    assert longest.ranges[-2].startswith("layer.")
    assert "deep_ep" in longest.work[0][0]


def _kernels(capture: Capture, *words: str) -> list[tuple[str, int, int]]:
    rows = zip(capture.gpu["name"].tolist(), capture.gpu["start"].tolist(), capture.gpu["end"].tolist(), strict=True)
    return [(capture.names[n], a, b) for n, a, b in rows if any(word in capture.names[n] for word in words)]


def test_a_run_has_the_same_overlap_as_its_records(tmp_path: Path) -> None:
    path = good_run().write(tmp_path)
    trace = read_trace(path / "trace.sqlite")
    work = work_of_capture(prepare(read_capture(path)))
    for name, pair in PAIRS.items():
        assert measure(work, pair) == measure(trace.records, pair), name
    assert measure(work, PAIRS["balancer"]).whole.total > 0


def test_device_work_of_a_run_names_the_call_that_put_it_there(tmp_path: Path) -> None:
    capture = capture_of(read_trace(good_run().write(tmp_path) / "trace.sqlite"))
    route = np.flatnonzero([capture.names[name] == "route" for name in capture.gpu["name"]])
    calls = capture.calls[Launches(capture).call[route]]
    assert {capture.names[name] for name in calls["name"]} == {"route"}
    assert (calls["start"] <= capture.gpu["start"][route]).all()
    assert main_streams(capture) == {(0, 0): 0, (1, 1): 0}


def test_the_main_stream_is_the_one_with_the_most_compute_unless_one_is_named() -> None:
    made = MakeCapture()
    made.gpu(Role.COMPUTE, 0, 10, 7)
    made.gpu(Role.COMPUTE, 0, 11, 8)
    made.gpu(Role.COMM, 0, 99, 9)
    assert main_streams(made.done()) == {(0, 0): 8}
    made.stream(9, "Main")
    assert main_streams(made.done()) == {(0, 0): 9}


def test_an_expert_parallel_trace_has_numbers_where_a_name_prefix_finds_none(tmp_path: Path) -> None:
    """The same tool gives NaN here, since no kernel is called nccl."""
    made = expert_parallel()
    work = work_of_capture(prepare(read_capture(made.write(tmp_path / "t.json"))))
    moving, waiting = (measure(work, PAIRS[name]) for name in ("communication", "communication_waits"))
    assert moving.whole.overlap is not None
    assert 0 < moving.whole.overlap < 1
    assert waiting.whole.total > moving.whole.total
    assert set(moving.by_layer()) == {0, 1, 2}
    assert set(moving.by_iteration()) == {0, 1}
    assert measure(work, PAIRS["balancer"]).whole.overlap is None


# -- replays, whose stream numbers mean nothing ------------------------------------------------------------------------


def _replay(*, nodes: bool) -> Capture:
    """The model's work on streams that change within a replay, the balancer's on those and on others."""
    made = MakeCapture()
    work = [
        (Role.COMPUTE, 0, 40, 7), (Role.COMM, 40, 60, 31), (Role.COMPUTE, 60, 100, 32),
        (Role.EPLB_STATISTIC, 10, 30, 31), (Role.EPLB_ALLREDUCE, 45, 75, 7), (Role.EPLB_SIGNAL, 90, 110, 32),
    ]  # fmt: skip
    made.call(0, 2, 5, "cudaGraphLaunch")
    for node, (role, start, end, stream) in enumerate(work):
        which = {"graph_node": 1 + node} if nodes else {"correlation": 5}
        made.gpu(role, 100 + start, 100 + end, stream, **which)
    return made.done()


@pytest.mark.parametrize("nodes", [True, False], ids=["told by node", "told by call"])
def test_of_a_replay_all_the_models_work_hides_on_whatever_streams_the_device_did_it(nodes: bool) -> None:
    capture = _replay(nodes=nodes)
    work = work_of_capture(capture)
    shares = {name: measure(work, PAIRS[name]).whole for name in ("statistic", "reduction", "handover")}
    assert shares == {"statistic": Hidden(20, 20), "reduction": Hidden(30, 30), "handover": Hidden(20, 10)}
    (stretch,) = largest_exposed(capture, PAIRS["handover"])
    assert (stretch.start, stretch.end) == (200, 210)
    assert main_stall(capture) is None, "what a replay waited for leaves no record"


def test_launched_work_hides_on_the_main_stream_alone() -> None:
    made = MakeCapture()
    made.launched(Role.COMPUTE, 0, 10, 50)
    made.launched(Role.COMPUTE, 2, 60, 70, 31)
    made.launched(Role.EPLB_STATISTIC, 4, 40, 70, 20)
    assert measure(work_of_capture(made.done()), PAIRS["statistic"]).whole == Hidden(30, 10)
