"""The order check of any capture: what it needs, what it infers, what it shows, and what stays unknown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.call_names import load_call_names
from moe_eplb.analysis.capture import ROLE_CODE, Capture, Table
from moe_eplb.analysis.conformance import replay
from moe_eplb.analysis.order_check import OrderReport, check_order
from moe_eplb.analysis.order_check_calls import find_calls
from moe_eplb.analysis.order_check_flags import infer_flags
from moe_eplb.analysis.readers.any import read_capture, read_captures
from moe_eplb.analysis.readers.records import capture_of
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.trace import Records, Trace
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import DEVICE_STAGES, HOST, Kind, Role
from moe_eplb.core.verdict import Status
from tests.analysis.captures import MakeCapture
from tests.support.run_folders import good_run
from traces.defects import Good
from traces.files import write

TRACES = Path(__file__).parents[2] / "traces"
GOOD, BAD = TRACES / "good_captures", TRACES / "bad_captures"
CALLS = (
    "start_wait_gpu_stage", "done_wait_gpu_stage", "update_statistic_with_local_ids", "route", "start_set_cpu_stage",
    "done_set_cpu_stage",
)  # fmt: skip


def _read(name: str) -> Capture:
    return prepare(read_captures([GOOD / name]))


def _unknown(report: OrderReport) -> set[str]:
    return {check.name for check in report.checks if check.status is Status.UNKNOWN}


class Calls(MakeCapture):
    """Calls one after the other, on one thread."""

    def __init__(self, domain: str = "moe_eplb") -> None:
        super().__init__()
        self.now, self._domain = 0, domain

    def made(self, text: str, **more: int) -> None:
        """A call of 10 ns."""
        self.range(text, self.now, self.now + 10, self._domain, **more)
        self.now += 20

    def layer(self, layer: str, **more: int) -> None:
        """All calls of a layer."""
        for name in CALLS:
            self.made(f"{name}{layer}", **more)

    def report(self, *tables: Path | str) -> OrderReport:
        """What is said of them."""
        return check_order(prepare(self.done()), tables)


# -- what is not there -------------------------------------------------------------------------------------------------


def test_without_calls_every_order_check_is_unknown_and_says_how_to_name_them() -> None:
    made = MakeCapture()
    made.gpu(Role.COMPUTE, 0, 10)
    made.range("forward", 0, 10)
    report = check_order(made.done())
    assert _unknown(report) == {"call_order", "joins", "times", "complete"}
    assert all("--call-names" in report.check(name).detail for name in _unknown(report))
    assert report.status is Status.UNKNOWN
    assert report.calls == {}


def test_a_capture_without_ranges_or_without_anything_does_not_break() -> None:
    empty = check_order(MakeCapture().done())
    assert _unknown(empty) == {"call_order", "joins", "times", "complete", "waits_not_work"}
    assert check_order(replace(_read("path_b.nsys.sqlite.gz"), gpu=np.empty(0, c.GPU))).status is Status.UNKNOWN


def test_a_route_alone_is_made_without_a_balancer_too() -> None:
    calls = Calls()
    calls.made("route/0", payload=0)
    assert "no calls of the balancer" in calls.report().check("call_order").detail


def test_without_iterations_their_order_is_unknown() -> None:
    calls = Calls()
    calls.layer("/0")
    report = calls.report()
    assert report.check("call_order").status is Status.UNKNOWN
    assert "no start_iter was seen" in report.check("call_order").detail
    assert "no layer is seen to have dynamic routing" in report.check("joins").detail


def test_what_is_missing_makes_even_a_violation_unknown_and_still_shows_it() -> None:
    capture = prepare(read_captures(list(BAD.glob("call_order-E112-done_twice.*"))))
    assert check_order(capture).check("call_order").status is Status.INVALID
    found = check_order(replace(capture, incomplete="12 events were dropped")).check("call_order")
    assert found.status is Status.UNKNOWN
    assert "12 events were dropped" in found.detail
    assert "E112" in found.detail


def test_launches_of_a_graph_that_is_captured_have_no_kernels_and_lose_none() -> None:
    assert check_order(_read("path_b_graph.nsys.sqlite.gz")).check("complete").status is Status.VALID


def test_records_that_were_taken_out_are_counted(tmp_path: Path) -> None:
    run = good_run().write(tmp_path)
    capture = read_capture(run)
    assert capture.incomplete == ""
    cut = read_capture(BAD / "complete-record_taken_out.trace.sqlite.gz")
    assert cut.incomplete == "rank 0: of its records 1 are not in the trace"


# -- what is told of calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", "abc")
def test_inferred_flags_are_those_that_were_recorded(path: str) -> None:
    capture = _read(f"path_{path}.trace.sqlite.gz")
    recorded = find_calls(capture, load_call_names()).calls
    stage = recorded["kind"] < Kind.START_ITER
    # A call that gives no statistics has no first and last stage; the recorder notes the default of all three flags.
    counts = np.isin(recorded["kind"], [2, 5, 6])
    silent = recorded.copy()
    silent["flags"] = c.UNKNOWN
    flags, inferred = infer_flags(silent)
    assert inferred
    assert flags[counts].tolist() == recorded["flags"][counts].tolist()
    assert (flags[stage] & 4 == recorded["flags"][stage] & 4).all()
    assert infer_flags(recorded)[1] is False


def test_chunks_of_a_stage_have_one_first_and_one_last() -> None:
    calls = Calls()
    calls.made("start_iter", payload=0)
    for name in (*CALLS[:2], *(3 * [CALLS[2]]), *CALLS[3:]):
        calls.made(f"{name}/0", payload=0)
    calls.made("end_iter", payload=0)
    found = find_calls(calls.done(), load_call_names()).calls
    flags, _ = infer_flags(found)
    assert flags[found["kind"] == Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS].tolist() == [1 | 4, 4, 2 | 4]
    assert calls.report().check("call_order").status is Status.VALID


def test_what_was_inferred_and_counted_is_said() -> None:
    calls = Calls("")
    for _ in range(2):
        calls.made("MoeLoadBalancer.start_iter")
        for _ in range(3):
            calls.layer("")
        calls.made("MoeLoadBalancer.end_iter")
    report = calls.report("tensorrt_llm")
    found = report.check("call_order")
    assert found.status is Status.VALID
    assert found.observed == "36 stage calls on 1 rank, iterations counted, layers counted, flags inferred"
    assert report.notes == ("iterations counted", "layers counted", "flags inferred")
    counted = find_calls(calls.done(), load_call_names(["tensorrt_llm"])).calls
    assert counted["layer"][counted["kind"] == Kind.ROUTE].tolist() == [0, 1, 2, 0, 1, 2]
    assert counted["iteration"][counted["kind"] == Kind.ROUTE].tolist() == [0, 0, 0, 1, 1, 1]


def test_numbers_come_from_ranges_around_the_call() -> None:
    calls = Calls("")
    for iteration in (7, 8):
        begun = calls.now
        calls.now += 5
        calls.made("MoeLoadBalancer.start_iter")
        for layer in (3, 5):
            entered = calls.now
            calls.now += 5
            calls.layer("")
            calls.range(f"layer {layer}", entered, calls.now)
            calls.now += 5
        calls.made("MoeLoadBalancer.end_iter")
        calls.range(f"[Executor] _forward_step {iteration}: 0 ctx reqs, 4 gen reqs", begun, calls.now)
        calls.now += 5
    report = calls.report("tensorrt_llm")
    assert report.check("call_order").observed == "24 stage calls on 1 rank, flags inferred"
    assert report.check("call_order").status is Status.VALID
    found = find_calls(calls.done(), load_call_names(["tensorrt_llm"])).calls
    routes = found[found["kind"] == Kind.ROUTE]
    assert routes[["layer", "iteration"]].tolist() == [(3, 7), (5, 7), (3, 8), (5, 8)]


def test_a_range_can_be_an_iteration(tmp_path: Path) -> None:
    table = tmp_path / "names.yaml"
    table.write_text("calls: [{text: '_forward_step (?P<iteration>\\d+)', call: iteration}]")
    calls = Calls("")
    for iteration in (0, 2):
        begun = calls.now
        calls.now += 5
        calls.layer(" layer 0")
        calls.range(f"_forward_step {iteration}", begun, calls.now)
        calls.now += 5
    report = calls.report(table, "tensorrt_llm")
    assert report.check("complete").detail == "rank 0: iteration 1 is not in the trace"
    assert report.check("call_order").status is Status.UNKNOWN
    assert report.illegal == ()


def test_a_call_within_a_call_is_its_work() -> None:
    calls = Calls()
    calls.made("start_iter", payload=0)
    for name in CALLS:
        begun = calls.now
        calls.now += 2
        calls.made(f"{name}/0", payload=0)
        calls.range(f"{name}/0", begun, calls.now, "moe_eplb", payload=0)
        calls.now += 2
    calls.made("end_iter", payload=0)
    report = calls.report()
    assert report.check("call_order").status is Status.VALID
    assert report.calls == {0: 6}


def test_a_violation_has_its_place_its_neighbours_and_the_ranges_around_it() -> None:
    calls = Calls()
    calls.made("start_iter", payload=0)
    calls.made("start_wait_gpu_stage/0", payload=0)
    calls.made("done_wait_gpu_stage/0", payload=0)
    calls.made("done_wait_gpu_stage/0", payload=0)
    calls.call(calls.now + 1, calls.now + 2, 1)
    calls.gpu(Role.EPLB_STATISTIC, 900, 950, 9, correlation=1)
    calls.made("update_statistic_with_local_ids/0", payload=0)
    calls.range("forward", 15, calls.now + 10)
    calls.range("my_layer", 50, calls.now + 5)
    calls.stream(9, "MoeBalancer")
    report = calls.report()
    (illegal,) = report.illegal
    assert (illegal.rank, illegal.code) == (0, "E102")
    assert (illegal.call.start, illegal.call.thread, illegal.call.layer) == (60, 1, 0)
    assert [one.name for one in illegal.before] == ["start_iter", "start_wait_gpu_stage", "done_wait_gpu_stage"]
    assert [one.streams for one in illegal.after] == [("MoeBalancer",)]
    assert illegal.path == ("forward", "my_layer", "done_wait_gpu_stage/0")
    text = str(illegal)
    assert "  > 60 ns thread 1 done_wait_gpu_stage layer 0 iteration 0" in text
    assert "in forward > my_layer > done_wait_gpu_stage/0" in text
    found = report.check("call_order")
    assert found.detail.startswith("E102 layer 0, iteration 0: done_wait_gpu_stage: there is no wait to be done with")
    assert "20 ns thread 1 start_wait_gpu_stage layer 0 iteration 0" in found.detail
    assert found.where == "rank 0, 60 ns"


def test_a_table_that_is_refused_stops_the_check(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E070"):
        check_order(MakeCapture().done(), [tmp_path / "missing.yaml"])


# -- the slow twin: the records themselves -----------------------------------------------------------------------------


_LEGAL = [
    (Kind.START_ITER, -1), *((Kind(kind), layer) for layer in (0, 1) for kind in (0, 1, 5, 7, 8, 9)),
    (Kind.END_ITER, -1),
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.sampled_from(["drop", "twice", "swap", "flags"]), st.integers(0, 27), st.integers(0, 7)), max_size=4
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EDITS)
def test_records_replay_as_the_records_themselves_do(edits: list[tuple[str, int, int]]) -> None:
    steps = [(kind, layer, iteration, 7) for iteration in (0, 1) for kind, layer in _LEGAL]
    for edit, at, flags in edits:
        at = min(at, len(steps) - 2)
        if edit == "drop":
            del steps[at]
        elif edit == "twice":
            steps.insert(at, steps[at])
        elif edit == "swap":
            steps[at], steps[at + 1] = steps[at + 1], steps[at]
        else:
            steps[at] = (*steps[at][:3], flags | 4)
    trace = _trace(steps)
    slow, fast = replay(trace, 2), check_order(capture_of(trace))
    begun = {layer for kind, layer, _, _ in steps if kind == 0}
    if begun != {0, 1}:
        return  # how many layers there are is told by a scenario to the one and by the calls to the other
    assert [(v.rank, v.code, v.what) for v in slow.violations] == [(i.rank, i.code, i.what) for i in fast.illegal]
    if slow.violations and not slow.unfinished:
        assert fast.check("call_order").status is Status.INVALID
        assert [one.split(" ")[0] for one in slow.violations[0].before] == [one.name for one in fast.illegal[0].before]
    if slow.unfinished:
        assert fast.check("complete").status is Status.UNKNOWN


def _trace(steps: list[tuple[Kind, int, int, int]]) -> Trace:
    lasts = {kind: 5 if kind < Kind.START_ITER else 0 for kind in Kind}
    rows = [
        [0, number, 10 * number, 10 * number + lasts[kind], kind, HOST, 1, layer, iteration, flags, 0]
        for number, (kind, layer, iteration, flags) in enumerate(steps)
    ]
    return Trace(Path("made"), Records(*np.array(rows, np.int64).T), {}, {})


# -- ranks and clocks --------------------------------------------------------------------------------------------------


def test_ranks_of_several_files_are_judged_as_one(tmp_path: Path) -> None:
    paths = []
    for rank in (0, 1):
        job = Good("chrome").job()
        job.steps = {rank: job.steps[0]}
        paths.append(tmp_path / f"rank{rank}.json.gz")
        write(job, "chrome", paths[-1])
    report = check_order(prepare(read_captures(paths)))
    assert {check.name for check in report.checks if check.status is not Status.VALID} == set()
    assert report.calls == {0: 36, 1: 36}


def _collectives(*times: tuple[int, int, int, int], name: str = "ncclDevKernel_AllReduce_Sum") -> Capture:
    """Collectives of two ranks: start and end of each."""
    made = MakeCapture()
    for first in times:
        for rank in (0, 1):
            made.gpu(Role.COMM, first[2 * rank], first[2 * rank + 1], rank=rank, name=name)
    return made.done()


@pytest.mark.parametrize(
    ("times", "status", "said"),
    [
        ([(0, 100, 50, 101), (200, 300, 299, 301)], Status.VALID, ""),
        ([(0, 100, 100, 101)], Status.VALID, ""),
        ([(0, 100, 130, 200)], Status.INVALID, "rank 1's clock is ahead by 30 to 200 ns"),
        ([(130, 200, 0, 100)], Status.INVALID, "rank 1's clock is behind by 30 to 200 ns"),
        ([(0, 100, 150, 200), (300, 400, 200, 250)], Status.INVALID, "no offset of their clocks fits"),
    ],
)
def test_clocks_are_bounded_by_every_collective(
    times: list[tuple[int, int, int, int]], status: Status, said: str
) -> None:
    found = check_order(_collectives(*times)).check("clocks")
    assert found.status is status
    assert said in found.detail


def test_ranks_between_others_must_be_there() -> None:
    calls = Calls()
    for rank in (0, 7, 2_000_000_000):
        calls.now = 0
        calls.made("start_iter", payload=0, rank=rank)
        calls.layer("/0", payload=0, rank=rank)
        calls.made("end_iter", payload=0, rank=rank)
    found = calls.report().check("complete")
    assert found.status is Status.UNKNOWN
    assert found.detail == "not in the trace: rank 1 and 1999999997 more"


@pytest.mark.parametrize("name", ["ncclDevKernel_Broadcast_RING", "ncclDevKernel_SendRecv"])
def test_a_rank_may_leave_some_collectives_early(name: str) -> None:
    found = check_order(_collectives((0, 100, 130, 200), name=name)).check("clocks")
    assert found.status is Status.UNKNOWN
    assert "no collective in common" in found.detail


# -- waiting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role", "status"),
    [
        ("moeWaitSignalForGpuStageKernel", Role.EPLB_WAIT, Status.VALID),
        ("moeWaitSignalForGpuStageKernel", Role.EPLB_STATISTIC, Status.INVALID),
        ("void deep_ep::intranode::notify_dispatch<8>(int)", Role.COMM_WAIT, Status.VALID),
        ("void deep_ep::intranode::notify_dispatch<8>(int)", Role.COMM, Status.INVALID),
        ("start_wait_gpu_stage", Role.COMPUTE, Status.INVALID),
        ("gemm", Role.COMPUTE, Status.VALID),
        ("moeWaitSignalForGpuStageKernel", Role.OTHER, Status.VALID),
    ],
)
def test_what_waits_by_its_name_must_not_work(name: str, role: Role, status: Status) -> None:
    made = MakeCapture()
    made.gpu(role, 0, 10, name=name)
    assert check_order(made.done()).check("waits_not_work").status is status


def test_roles_are_found_if_nobody_has_yet() -> None:
    capture = read_captures([GOOD / "path_b.nsys.sqlite.gz"])
    assert (capture.gpu["role"] == c.UNSET_ROLE).all()
    assert check_order(capture).status is Status.VALID


def test_a_role_is_checked_as_it_is() -> None:
    capture = _read("path_b_tensorrt_llm.nsys.sqlite.gz")
    gpu = capture.gpu.copy()
    gpu["role"] = ROLE_CODE[Role.COMPUTE]
    found = check_order(replace(capture, gpu=gpu), ["tensorrt_llm"]).check("waits_not_work")
    assert found.status is Status.INVALID
    assert found.observed == "12 of 132 GPU events wait"


# -- graphs ------------------------------------------------------------------------------------------------------------


def _without_nodes(capture: Capture) -> Capture:
    """As if the capture of the graph had not been seen."""
    return replace(capture, nodes=capture.nodes[:0])


def _traced_as_a_whole(capture: Capture) -> Capture:
    """As a profiler that does not look into graphs."""
    gpu = capture.gpu[capture.gpu["graph_node"] < 0]
    return replace(capture, gpu=gpu, nodes=capture.nodes[:0])


def _parts(capture: Capture) -> Capture:
    """Every second event of a replay was of another graph."""
    calls, gpu = capture.calls.copy(), capture.gpu.copy()
    half = (gpu["graph_node"] > 0) & (gpu["layer"] == 1)
    gpu["correlation"][half] += 10_000
    return replace(capture, gpu=gpu, calls=calls)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda capture: capture, "edges are not in the trace"),
        (_without_nodes, "no node of a graph was captured in a call"),
        (_traced_as_a_whole, "no node of a graph was captured in a call"),
        (_parts, "graphs of parts of the model"),
    ],
)
def test_what_a_trace_does_not_tell_of_graphs_is_unknown(change: Callable[[Capture], Capture], said: str) -> None:
    found = check_order(change(_read("path_b_graph.nsys.sqlite.gz"))).check("graph_order")
    assert found.status is Status.UNKNOWN
    assert said in found.detail


def _with_notes(left_out: tuple[int, int, int] | None = None) -> Capture:
    """The graph captured before the iterations, and of each replay a mark and what the device wrote down.

    Args:
        left_out: Rank, iteration and layer of one stage that the device did not write down.
    """
    capture = _read("path_b_graph.nsys.sqlite.gz")
    ranges, names = capture.ranges.copy(), list(capture.names)
    starts = ranges["text"] == names.index("start_iter")
    stages = ~np.isin(ranges["text"], [names.index(name) for name in ("start_iter", "end_iter")])
    ours = ranges["domain"] == names.index("moe_eplb")
    added = []
    for rank in np.unique(ranges["rank"][ours]).tolist():
        mine = ours & (ranges["rank"] == rank)
        calls, begins = ranges[mine & stages], np.flatnonzero(mine & starts)
        ranges["start"][begins[0]] = ranges["end"][begins[0]] = calls["end"].max() + 100
        added.append(_like(calls[0], names, "capture", -2, calls["start"].min() - 1, calls["end"].max() + 1))
        for iteration, at in enumerate(ranges["start"][begins].tolist()):
            added.append(_like(calls[0], names, "replay", iteration, at + 10))
            noted = [layer for layer in (0, 1) for _ in DEVICE_STAGES]
            if left_out is not None and (rank, iteration) == left_out[:2]:
                noted.remove(left_out[2])
            added += [_like(calls[0], names, f"device_stage/{layer}", iteration, at + 20) for layer in noted]
    return replace(capture, ranges=np.concatenate([ranges, *added]), names=tuple(names)).in_order()


def _like(row: np.void, names: list[str], text: str, iteration: int, start: int, end: int = 0) -> Table:
    """A range of the same thread, or a mark."""
    if text not in names:
        names.append(text)
    made = np.array([row])
    made["start"], made["end"], made["payload"] = start, end or start, iteration
    made["text"], made["kind"] = names.index(text), c.PUSH_POP if end else c.MARK
    return made


def test_what_the_device_wrote_down_in_an_export_is_evidence_too() -> None:
    found = check_order(_with_notes()).check("graph_order")
    assert (found.status, found.detail) == (
        Status.UNKNOWN, "the graph's edges are not in the trace, so that its nodes may wait for too little",
    )  # fmt: skip
    found = check_order(_with_notes(left_out=(1, 2, 0))).check("graph_order")
    assert "the device wrote down 3 of 4 stages" in found.detail
    assert found.status is Status.INVALID


@pytest.mark.parametrize("captured", ["begins", "is joined"])
@pytest.mark.parametrize("stage", ["wait_gpu_stage", "set_cpu_stage"])
def test_a_replay_without_a_stages_work_is_seen_wherever_that_was_captured(stage: str, captured: str) -> None:
    capture = _read("path_b_graph.nsys.sqlite.gz")
    nodes, gpu = capture.nodes.copy(), capture.gpu
    begun, joined = (_first_calls(capture, f"{begin}_{stage}/1") for begin in ("start", "done"))
    of_stage = [(nodes["thread"] == at[0]) & (nodes["start"] > at[1]) & (nodes["start"] < at[2]) for at in begun]
    assert [int(rows.sum()) for rows in of_stage] == [1, 1], "a node for each rank"
    for rows, (_, start, end) in zip(of_stage, joined, strict=True):
        if captured == "is joined":
            nodes["start"][rows] = (start + end) // 2
    kept = np.ones(len(gpu), np.bool_)
    kept[np.flatnonzero(gpu["graph_node"] == nodes["node"][of_stage[0]][0])[-1]] = False
    whole = check_order(replace(capture, nodes=nodes)).check("graph_order")
    found = check_order(replace(capture, nodes=nodes, gpu=gpu[kept])).check("graph_order")
    assert "a replay lacks" not in whole.detail
    assert f"a replay lacks start_{stage}" in found.detail
    assert found.status is Status.INVALID


def _first_calls(capture: Capture, name: str) -> list[tuple[int, int, int]]:
    """Thread, begin and end of each rank's first call of a name, which may have a range of its work inside."""
    mine = capture.ranges[capture.ranges["text"] == capture.names.index(name)]
    rows = [mine[mine["thread"] == thread] for thread in np.unique(mine["thread"])]
    return [(int(of["thread"][0]), int(of["start"].min()), int(of["end"][of["start"].argmin()])) for of in rows]


def test_iterations_that_replay_a_graph_need_no_calls() -> None:
    report = check_order(_read("path_b_graph.nsys.sqlite.gz"))
    assert report.check("call_order").status is Status.VALID
    assert "4 iterations replay a graph" in report.check("call_order").observed
    assert "see graph_order" in report.check("joins").detail
    for name in ("joins", "times"):
        assert report.check(name).observed.endswith("none of it in replays: see graph_order")
    assert "replays" not in check_order(_read("path_b.nsys.sqlite.gz")).check("joins").observed


# -- cost --------------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_calls_are_checked_in_seconds() -> None:
    capture = _repeated(_read("path_b.nsys.sqlite.gz"), 1_389)
    begun = process_time()
    report = check_order(capture)
    assert process_time() - begun < 6.0  # 1.6 s on an idle machine
    assert sum((report.calls or {}).values()) >= 100_000
    assert report.status is Status.VALID


def _repeated(capture: Capture, times: int) -> Capture:
    """The same iterations again and again, as one long run."""
    span, numbers = int(capture.gpu["end"].max()) + 10_000, int(capture.calls["correlation"].max()) + 1
    steps = {
        "start": span,
        "end": span,
        "correlation": numbers,
        "on_correlation": numbers,
        "payload": 3,
        "iteration": 3,
    }
    tables = {}
    for name, table in capture.tables().items():
        turn, long = np.repeat(np.arange(times), len(table)), np.tile(table, times)
        for column, step in steps.items():
            if column in (table.dtype.names or ()):
                long[column] += np.where(long[column] >= 0, turn * step, 0).astype(long[column].dtype)
        tables[name] = long
    return capture.with_tables(tables).in_order()
