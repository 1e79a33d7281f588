"""What comes after what: the vector clocks against plain reachability, and the joins that they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.joins import HappensBefore
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.readers.any import read_captures
from moe_eplb.analysis.roles import prepare
from moe_eplb.core.events import Kind, Role
from moe_eplb.core.verdict import Status
from tests.analysis.captures import MakeCapture
from traces.defects import Good
from traces.files import write

GOOD = Path(__file__).parents[2] / "traces" / "good_captures"
LANES = 3
_LANE, _BACK = range(LANES), range(3)
OPERATIONS = st.sampled_from(
    [
        *(("launch", lane) for lane in _LANE for _ in range(4)),
        *(("record", lane) for lane in _LANE for _ in range(3)),
        *(("wait", lane, back) for lane in _LANE for back in _BACK),
        *(("stream sync", lane) for lane in _LANE),
        *(("event sync", back) for back in _BACK),
        ("context sync",),
    ]
)


def test_a_wait_on_one_gpu_orders_nothing_on_another_one_of_its_process() -> None:
    made = MakeCapture()
    for device in (0, 1):
        made.launched(Role.EPLB_STATISTIC, 10 + device, 20, 30, 20, device=device)
    made.wait(7, 20, at=20)
    for device in (0, 1):
        made.launched(Role.COMPUTE, 30 + device, 40, 50, 7, device=device)
    capture = made.done()
    first, then = (np.flatnonzero(capture.gpu["stream"] == stream) for stream in (20, 7))
    devices = capture.gpu["device"][then]
    assert HappensBefore(capture).before(first, then).tolist() == (devices == 0).tolist()


class Program(MakeCapture):
    """Calls of one thread one after the other, and beside them what really comes after what, edge by edge.

    Events are named by how many were recorded since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.correlation = 0, 0
        self.edges: list[set[int]] = []
        self.launches: list[int] = []
        self._last = dict.fromkeys(range(LANES), -1)
        self._host = -1
        self._events: list[tuple[int, int, int]] = []

    def do(self, operation: tuple[object, ...]) -> None:
        """Make a call; one that names an event which is not there does nothing."""
        name, numbers = operation[0], [n for n in operation[1:] if isinstance(n, int)]
        if name == "launch":
            self._launch(numbers[0])
        elif name == "record":
            self._events.append((numbers[0], self._api("cudaEventRecord"), self._node(numbers[0])))
        elif name == "wait" and numbers[1] < len(self._events):
            lane, (on, recorded, node) = numbers[0], self._events[-1 - numbers[1]]
            self._sync(c.SYNC_WAIT, self._api("cudaStreamWaitEvent"), lane, on, recorded)
            self.edges[self._node(lane)].add(node)
        elif name == "stream sync":
            self._sync(c.SYNC_STREAM, self._api("cudaStreamSynchronize"), numbers[0])
            self._host_waits({self._last[numbers[0]]})
        elif name == "event sync" and numbers[0] < len(self._events):
            on, recorded, node = self._events[-1 - numbers[0]]
            self._sync(c.SYNC_EVENT, self._api("cudaEventSynchronize"), c.UNKNOWN, on, recorded)
            self._host_waits({node})
        elif name == "context sync":
            self._sync(4, self._api("cudaDeviceSynchronize"), c.UNKNOWN)
            self._host_waits({*self._last.values()})

    def reaches(self, first: int, then: int) -> bool:
        """Whether a launch comes before another one, by walking all edges back."""
        waiting, seen = [self.launches[then]], set()
        while waiting:
            node = waiting.pop()
            if node == self.launches[first]:
                return True
            if node >= 0 and node not in seen:
                seen.add(node)
                waiting += self.edges[node]
        return False

    def _launch(self, lane: int) -> None:
        correlation = self._api("cudaLaunchKernel")
        at = 1_000_000 + len(self.launches) * 10
        self.gpu(Role.COMPUTE, at, at + 5, lane, correlation=correlation)
        node = self._node(lane)
        self.edges[node].add(self._host)
        self.launches.append(node)

    def _node(self, lane: int) -> int:
        self.edges.append({self._last[lane]})
        self._last[lane] = len(self.edges) - 1
        return self._last[lane]

    def _host_waits(self, nodes: set[int]) -> None:
        self.edges.append({*nodes, self._host})
        self._host = len(self.edges) - 1

    def _api(self, name: str) -> int:
        self.correlation += 1
        self.call(self.now, self.now + 2, self.correlation, name)
        self.now += 10
        return self.correlation

    def _sync(self, kind: int, correlation: int, lane: int, on: int = -1, recorded: int = -1) -> None:
        about = {"stream": lane, "on_stream": on, "correlation": correlation, "on_correlation": recorded}
        self._add("syncs", self.now - 10, self.now - 5, kind=kind, device=0, **about)


@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATIONS, min_size=40, max_size=60))
def test_clocks_agree_with_walking_every_edge(operations: list[tuple[object, ...]]) -> None:
    program = Program()
    for operation in [("launch", 0), *operations]:
        program.do(operation)
    capture = program.done()
    count = len(capture.gpu)
    first, then = (axis.reshape(-1) for axis in np.meshgrid(np.arange(count), np.arange(count), indexing="ij"))
    apart = first != then
    found = HappensBefore(capture).before(first[apart], then[apart])
    expected = [program.reaches(a, b) for a, b in zip(first[apart].tolist(), then[apart].tolist(), strict=True)]
    assert found.tolist() == expected


def test_calls_of_one_moment_are_in_the_order_of_their_numbers() -> None:
    made = MakeCapture()
    names = ("cudaLaunchKernel", "cudaEventRecord", "cudaStreamWaitEvent", "cudaLaunchKernel")
    for number, name in enumerate(names, 1):
        made.call(1_000, 1_000, number, name)
    made.gpu(Role.COMPUTE, 2_000, 3_000, 7, correlation=1)
    made.gpu(Role.COMPUTE, 3_000, 4_000, 8, correlation=4)
    about = {"stream": 8, "on_stream": 7, "correlation": 3, "on_correlation": 2, "kind": c.SYNC_WAIT}
    made._add("syncs", 1_000, 1_000, device=0, **about)
    order = HappensBefore(made.done())
    assert order.before(np.array([0, 1]), np.array([1, 0])).tolist() == [True, False]


def test_a_wait_whose_call_is_not_in_the_trace_was_asked_for_when_it_began() -> None:
    program = Program()
    for operation in [("launch", 0), ("record", 0), ("launch", 1), ("wait", 1, 0), ("launch", 1)]:
        program.do(operation)
    capture = program.done()
    waiting = capture.calls["name"] == capture.names.index("cudaStreamWaitEvent")
    order = HappensBefore(replace(capture, calls=capture.calls[~waiting]))
    assert order.before(np.array([0, 0]), np.array([1, 2])).tolist() == [False, True]


def test_what_has_no_known_launch_is_in_order_on_its_stream_alone() -> None:
    made = MakeCapture()
    made.gpu(Role.COMPUTE, 0, 5, 7)
    made.gpu(Role.COMPUTE, 10, 15, 7)
    made.gpu(Role.COMPUTE, 20, 25, 8)
    order = HappensBefore(made.done())
    assert order.before(np.array([0, 0]), np.array([1, 2])).tolist() == [True, False]


class Layer:
    """One layer of one iteration with two chunks on streams of their own; each edge can be left out."""

    def __init__(self, without: str = "", coarse: bool = False) -> None:
        self.made, self._without, self._now = MakeCapture(), without, 10
        for stream, name in ((7, "Main"), (8, "MoeChunkingOverlap"), (9, "MoeBalancer")):
            self.made.stream(stream, name)
        self._mark("start_iter")
        self._call("start_wait_gpu_stage", 9, waits_for=7)
        self._work("topk", 8)
        self._call("done_wait_gpu_stage", joins="wait by chunk 0")
        self._call("update_statistic_with_local_ids", 9, waits_for=8, joins="top-k of chunk 0")
        self._call("route", 8, waits_for=9, joins="wait by chunk 0")
        self._work("experts", 8)
        self._work("topk", 7)
        self._call("update_statistic_with_local_ids", 9, waits_for=7, joins="top-k of chunk 1")
        self._call("route", 7, waits_for=9, joins="wait by chunk 1")
        self._work("experts", 7)
        self._wait("hand-over by chunk 0", 9, 8)
        self._call("start_set_cpu_stage", 9, waits_for=7, joins="hand-over by chunk 1")
        self._call("done_set_cpu_stage")
        self._mark("end_iter")

    def capture(self) -> Capture:
        return prepare(self.made.done())

    def _mark(self, name: str) -> None:
        self.made.range(name, self._now, self._now, "moe_eplb", payload=0, kind=c.MARK)
        self._now += 10

    def _call(self, name: str, stream: int = 0, waits_for: int = 0, joins: str = "") -> None:
        begun = self._now
        self._now += 5
        if waits_for:
            self._wait(joins, stream, waits_for)
        if stream:
            self._launch(stream)
        self.made.range(f"{name}/0", begun, self._now, "moe_eplb", payload=0)
        self._now += 5

    def _work(self, name: str, stream: int) -> None:
        self._call(name, stream)

    def _wait(self, what: str, stream: int, on: int) -> None:
        if what != self._without:
            self.made.wait(stream, on, self._now)
        self._now += 10

    def _launch(self, stream: int) -> None:
        at = self._now + 10_000
        self.made.launched(None, self._now, at, at + 4, stream, name="gemm")
        self._now += 5


def test_chunks_that_join_are_valid() -> None:
    report = check_order(Layer().capture())
    assert report.check("joins").status is Status.VALID
    assert report.check("times").status is Status.VALID
    assert report.check("call_order").status is Status.VALID


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("wait by chunk 0", "route on MoeChunkingOverlap did not wait for start_wait_gpu_stage on MoeBalancer"),
        ("wait by chunk 1", "route on Main did not wait for start_wait_gpu_stage on MoeBalancer"),
        (
            "top-k of chunk 0",
            "local_ids on MoeBalancer did not wait for topk on MoeChunkingOverlap",
        ),
        ("top-k of chunk 1", "local_ids on MoeBalancer did not wait for topk on Main"),
        ("hand-over by chunk 0", "start_set_cpu_stage on MoeBalancer did not wait for experts on MoeChunkingOverlap"),
        ("hand-over by chunk 1", "start_set_cpu_stage on MoeBalancer did not wait for experts on Main"),
    ],
)
def test_each_join_of_each_chunk_is_needed(without: str, said: str) -> None:
    report = check_order(Layer(without).capture())
    joins = report.check("joins")
    assert joins.status is Status.INVALID
    assert said in joins.detail
    assert joins.where == "rank 0, layer 0, iteration 0"
    assert report.check("times").status is Status.VALID  # everything ran one after the other all the same


def _good(name: str) -> Capture:
    return prepare(read_captures([GOOD / name]))


@pytest.mark.parametrize(("late", "status"), [(0, Status.VALID), (1_000, Status.VALID), (2_000, Status.INVALID)])
def test_a_clock_of_whole_microseconds_may_be_off_by_one(late: int, status: Status) -> None:
    capture = _good("path_b.chrome.json.gz")
    gpu = capture.gpu.copy()
    route, wait = (gpu["name"] == capture.names.index(name) for name in ("_route", "_take_over"))
    gpu["end"][wait] = gpu["start"][route] + late
    assert check_order(replace(capture, gpu=gpu)).check("times").status is status
    gpu["end"][gpu["end"].argmax()] += 1  # a clock that counts ns is never off
    exact = check_order(replace(capture, gpu=gpu)).check("times").status
    assert exact is (Status.INVALID if late else Status.VALID)


def test_streams_that_are_one_need_no_waits() -> None:
    capture = _good("path_b_no_waits.nsys.sqlite.gz")
    gpu = capture.gpu.copy()
    gpu["stream"] = 7
    joins = check_order(replace(capture, gpu=gpu)).check("joins")
    assert joins.status is Status.VALID
    assert "46 of one stream" in joins.observed


def test_without_ranges_of_the_experts_the_main_stream_stands_in_for_them() -> None:
    capture = _good("path_b_tensorrt_llm.nsys.sqlite.gz")
    named = [capture.names[text].startswith(("topk", "experts")) for text in capture.ranges["text"]]
    nameless = replace(capture, ranges=capture.ranges[~np.array(named)])
    joins = check_order(nameless, ["tensorrt_llm"]).check("joins")
    assert joins.status is Status.VALID
    # Without the wait of the statistics nobody knows whether what ran before them on the main stream made their ids.
    syncs = capture.syncs[np.arange(len(capture.syncs)) % 5 != 2]
    joins = check_order(replace(nameless, syncs=syncs), ["tensorrt_llm"]).check("joins")
    assert joins.status is Status.UNKNOWN
    assert "not sure that one is needed" in joins.detail


def test_no_work_of_a_stage_is_no_pass() -> None:
    capture = _good("path_b.nsys.sqlite.gz")
    gpu = capture.gpu[capture.gpu["name"] != capture.names.index("_hand_over")]
    report = check_order(replace(capture, gpu=gpu))
    for name in ("joins", "times"):
        assert report.check(name).status is Status.UNKNOWN
    assert "kernels are not in the trace" in report.check("complete").detail


def test_our_own_device_notes_every_stage() -> None:
    capture = _good("path_b.trace.sqlite.gz")
    rows = np.flatnonzero(capture.gpu["name"] == capture.names.index("start_set_cpu_stage"))
    report = check_order(replace(capture, gpu=np.delete(capture.gpu, rows[0])))
    assert report.check("joins").status is Status.UNKNOWN
    assert report.check("joins").where == "rank 0, layer 0, iteration 0"


def test_statistics_before_the_top_k_are_not_those_of_another_layer(tmp_path: Path) -> None:
    job = Good("nsys").job()
    for steps in job.steps.values():
        top_k, counts = (
            next(n for n, step in enumerate(steps) if (step.kind, step.layer, step.iteration) == (kind, 1, 1))
            for kind in (Kind.TOPK, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS)
        )
        steps.insert(counts + 1, steps.pop(top_k))
    path = tmp_path / "late.sqlite.gz"
    write(job, "nsys", path)
    joins = check_order(prepare(read_captures([path]))).check("joins")
    assert joins.status is Status.INVALID
    assert "did not wait for topk on Main" in joins.detail
    assert joins.where == "rank 0, layer 1, iteration 1"


def test_what_is_launched_between_stages_belongs_to_none() -> None:
    capture = _good("path_b_tensorrt_llm.nsys.sqlite.gz")
    route = next(name for name in capture.names if "moeComputeRoute" in name)
    late = int(capture.ranges["end"].max()) + 1_000
    gpu, calls = (table[table["rank"] == 0][-1:].copy() for table in (capture.gpu, capture.calls))
    gpu["name"], gpu["stream"], gpu["start"], gpu["end"] = capture.names.index(route), 99, late + 10, late + 20
    calls["start"], calls["end"] = late, late + 5
    gpu["correlation"] = calls["correlation"] = 1 << 30
    tables = {"gpu": np.concatenate([capture.gpu, gpu]), "calls": np.concatenate([capture.calls, calls])}
    assert check_order(capture.with_tables(tables).in_order(), ["tensorrt_llm"]).status is Status.VALID


def _two_layers(*, early: bool, joined: bool = True, named: bool = True) -> Capture:
    """An iteration of two layers, of which the second is taken over when its turn comes or `early`, by the first.

    Where they are not `named` all layers have to be counted, as a call before these is of none.
    """
    made, first = MakeCapture(), 0 if named else 4

    def inside(text: str, at: int, end: int) -> None:
        made.range(text, at, end, "moe_eplb", payload=0)

    def taken(layer: int, at: int) -> None:
        inside(f"start_wait_gpu_stage/{first + layer}", at, at + 10)
        made.launched(Role.EPLB_SIGNAL, at + 1, at + 5, at + 15, 20, name="_take_over")

    inside("start_iter", 0, 1)
    if not named:
        inside("start_wait_gpu_stage", 10, 12)
        inside("done_wait_gpu_stage", 14, 15)
    for layer, b in enumerate((100, 1100)):
        inside(f"start_wait_gpu_stage/{first + layer}", b, b + 20)
        if layer == 0 or not early:
            taken(layer, b + 5)
        if layer == 0 or joined:
            made.wait(7, 20, at=b + 25)
        inside(f"done_wait_gpu_stage/{first + layer}", b + 22, b + 30)
        inside(f"topk/{first + layer}", b + 31, b + 36)
        made.launched(Role.COMPUTE, b + 32, b + 40, b + 50, 7)
        inside(f"route/{first + layer}", b + 40, b + 60)
        made.launched(Role.COMPUTE, b + 43, b + 60, b + 80, 7)
        inside(f"experts/{first + layer}", b + 70, b + 80)
        made.launched(Role.COMPUTE, b + 72, b + 100, b + 400, 7)
        inside(f"start_set_cpu_stage/{first + layer}", b + 100, b + 160)
        if layer == 0 and early:
            taken(1, b + 105)
        made.wait(20, 7, at=b + 120)
        inside(f"start_set_cpu_stage/{first + layer}", b + 125, b + 135)
        made.launched(Role.EPLB_SIGNAL, b + 126, b + 405, b + 415, 20, name="_hand_over")
        if joined:
            made.wait(7, 20, at=b + 165)
        inside(f"done_set_cpu_stage/{first + layer}", b + 162, b + 170)
    inside("end_iter", 3000, 3001)
    return made.done()


@pytest.mark.parametrize("early", [False, True])
def test_a_layer_that_the_one_before_takes_over_is_waited_for_by_its_own_work(early: bool) -> None:
    report = check_order(_two_layers(early=early))
    assert {report.check(name).status for name in ("joins", "times")} == {Status.VALID}
    joins = check_order(_two_layers(early=early, joined=False)).check("joins")
    assert joins.status is Status.INVALID
    assert "route on stream 7 did not wait for start_wait_gpu_stage on stream 20" in joins.detail
    assert joins.where == "rank 0, layer 1, iteration 0"


def test_a_missing_join_is_seen_where_layers_have_to_be_counted() -> None:
    capture = _two_layers(early=False, joined=False, named=False)
    joins = check_order(capture).check("joins")
    assert joins.status is Status.INVALID
    assert "route on stream 7 did not wait for start_wait_gpu_stage on stream 20" in joins.detail
