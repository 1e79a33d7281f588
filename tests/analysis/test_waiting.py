"""Idle GPUs and the critical path: parts that sum to the whole, by the edges that hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.critical_path import HOST, LATENCY, UNEXPLAINED, critical_path, iteration_paths
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.idle import Cause, gpu_idle
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.selection import Selection
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture, stalled
from tests.analysis.profiler_traces import expert_parallel

MAIN, BALANCER = 7, 20


def _nonzero(causes: dict[Cause, int]) -> dict[str, int]:
    return {cause.value: ns for cause, ns in causes.items() if ns}


def test_a_gap_is_charged_by_what_ends_it() -> None:
    made = MakeCapture()
    made.launched(Role.COMPUTE, 0, 10, 20)
    made.launched(Role.COMPUTE, 50, 60, 70, iteration=4)  # launched 30 ns late, 2 ns of launch, 8 ns until it ran
    made.gpu(Role.COMPUTE, 75, 80)  # nobody knows who launched it
    made.span(c.OVERHEAD, 25, 35)
    made.span(c.CALLED_WORK, 30, 40)
    (idle,) = gpu_idle(made.done())
    assert (idle.span, idle.idle) == (70, 45)
    assert _nonzero(idle.causes) == {
        "host": 15, "profiler_overhead": 10, "called_work": 5, "launch": 2, "latency": 8, "unknown": 5,
    }  # fmt: skip
    assert idle.gaps.tolist() == [[20, 60], [70, 75]]


def test_time_after_a_launch_that_had_to_wait_is_a_wait() -> None:
    made = MakeCapture()
    made.launched(Role.EPLB_MIGRATE, 0, 10, 40, BALANCER)
    made.wait(MAIN, BALANCER, at=4)
    made.launched(Role.COMPUTE, 8, 50, 60)
    (idle,) = gpu_idle(made.done())
    assert _nonzero(idle.causes) == {"event_wait": 10}


_SPAN = st.tuples(st.integers(0, 200), st.integers(0, 30))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(_SPAN, st.integers(0, 60), st.sampled_from([7, 20]), st.booleans()), min_size=1, max_size=10),
    st.lists(st.tuples(_SPAN, st.booleans()), max_size=5),
)
def test_idle_parts_are_disjoint_and_sum_to_the_idle_time(
    events: list[tuple[tuple[int, int], int, int, bool]], spans: list[tuple[tuple[int, int], bool]]
) -> None:
    made = MakeCapture()
    for number, ((start, length), before, stream, known) in enumerate(events):
        if known:
            made.launched(Role.COMPUTE, start - before, start, start + length, stream, iteration=number % 3)
        else:
            made.gpu(Role.COMPUTE, start, start + length, stream, iteration=number % 3)
    for (start, length), overhead in spans:
        made.span(c.OVERHEAD if overhead else c.CALLED_WORK, start, start + length)
    busy = {t for (start, length), *_ in events for t in range(start, start + length)}
    (idle,) = gpu_idle(made.done())
    assert idle.idle == (max(busy) + 1 - min(busy) - len(busy) if busy else 0)
    assert sum(idle.causes.values()) == idle.idle
    assert min(idle.causes.values()) >= 0
    parts = [one for number in range(3) for one in gpu_idle(made.done(), _iterations(number))]
    assert sum(one.idle for one in parts) == idle.idle
    assert all(sum(one.causes.values()) == one.idle <= one.span for one in parts)
    assert sum(one.span for one in parts) >= idle.span  # more where iterations overlap


def _iterations(first: int, last: int | None = None) -> Selection:
    return Selection(iterations=((first, first if last is None else last),))


def test_idle_time_of_an_iteration_is_what_its_events_end_and_its_span_what_they_ran_besides() -> None:
    made = MakeCapture()
    for iteration, begin in enumerate((0, 100, 200)):
        made.launched(Role.COMPUTE, begin, begin + 10, begin + 30, iteration=iteration)
        made.launched(Role.COMM, begin + 2, begin + 20, begin + 40, BALANCER, iteration=iteration)
    made.launched(Role.EPLB_MIGRATE, 50, 120, 220, BALANCER, iteration=0)  # runs on into the last iteration
    capture = made.done()
    spans = {n: [(one.span, one.idle) for one in gpu_idle(capture, _iterations(n))] for n in range(4)}
    assert spans == {0: [(30 + 100, 0)], 1: [(70 + 30, 70)], 2: [(30, 0)], 3: []}
    (first_two,) = gpu_idle(capture, _iterations(0, 1))
    assert (first_two.span, first_two.idle, first_two.gaps.tolist()) == (30 + 70 + 110, 70, [[40, 110]])
    assert _nonzero(first_two.causes) == {"host": 60, "launch": 2, "latency": 8}


def test_gpus_without_an_event_of_the_selection_have_no_idle_time() -> None:
    made = MakeCapture()
    for rank, iterations in ((0, (2, 3)), (1, (2,))):
        for iteration in iterations:
            made.gpu(Role.COMPUTE, 100 * iteration, 100 * iteration + 40, rank=rank, iteration=iteration, layer=rank)
    made.gpu(Role.EPLB_MIGRATE, 300, 340, rank=1, iteration=3, kind=c.UPDATER_WORK)  # no GPU's work
    capture = made.done()

    def found(**asked: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int]]:
        return [(one.rank, one.span, one.idle) for one in gpu_idle(capture, Selection(**asked))]

    assert found(iterations=((3, 3),)) == [(0, 100, 60)]
    assert found(iterations=((2, 2),)) == [(0, 40, 0), (1, 40, 0)]
    assert found(ranks=((1, 1),)) == [(1, 40, 0)]
    assert found(layers=((0, 0),)) == found() == [(0, 140, 60), (1, 40, 0)]


# -- critical path -------------------------------------------------------------------------------------------------


def test_a_path_leads_over_every_kind_of_edge() -> None:
    capture = stalled(migrated_until=145)
    path = critical_path(capture, last=len(capture.gpu) - 1, begin=0)
    assert [(p.start, p.end, p.what) for p in path.parts] == [
        (0, 22, HOST), (22, 30, LATENCY), (30, 145, "eplb_migrate"), (145, 150, LATENCY), (150, 200, "compute"),
    ]  # fmt: skip
    assert path.balancer_share == pytest.approx(115 / 200)
    assert path.waits_known
    in_time = stalled(migrated_until=100)
    assert critical_path(in_time, len(in_time.gpu) - 1, 0).by_what().get("eplb_migrate", 0) <= 70


def test_a_launch_leads_back_to_the_call_that_blocked_its_thread() -> None:
    made = MakeCapture()
    made.launched(Role.COMPUTE, 0, 10, 60)
    made.call(5, 65, 90, "cudaStreamSynchronize")
    made.launched(Role.COMPUTE, 80, 85, 95)
    capture = made.done()
    path = critical_path(capture, 1, begin=0)
    assert [(p.start, p.end, p.what) for p in path.parts] == [
        (0, 2, HOST), (2, 10, LATENCY), (10, 60, "compute"), (60, 82, HOST), (82, 85, LATENCY), (85, 95, "compute"),
    ]  # fmt: skip


def test_an_event_that_nothing_explains() -> None:
    made = MakeCapture()
    made.gpu(Role.COMPUTE, 50, 60)
    path = critical_path(made.done(), 0, begin=20)
    assert path.by_what() == {"compute": 10, UNEXPLAINED: 30}
    assert not path.waits_known


def test_events_without_length_at_one_moment_end_the_walk() -> None:
    made = MakeCapture()
    made.call(40, 50, 90, "cudaDeviceSynchronize")
    made.launched(Role.COMPUTE, 50, 50, 50)
    path = critical_path(made.done(), 0, begin=10)
    assert path.by_what() == {HOST: 40}


def test_paths_of_a_training_step_tile_it(tmp_path: Path) -> None:
    capture = prepare(read_capture(expert_parallel().write(tmp_path / "t.json")))
    paths = iteration_paths(capture)
    assert sorted(paths) == [(0, 0), (0, 1)]
    for (_, iteration), path in paths.items():
        events = capture.gpu[capture.gpu["iteration"] == iteration]
        edges = [(part.start, part.end) for part in path.parts]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))
        assert path.length == path.parts[-1].end - path.parts[0].start
        assert path.parts[-1].end == events["end"].max()
        assert path.balancer_share == 0
        # Every layer's dispatch and combine wait for what is computed and the other way round: a chain of all.
        assert path.by_what()["comm"] > 0.3 * path.length


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 100), st.integers(0, 30), st.integers(0, 20), st.sampled_from([7, 20, 21]), st.booleans(),
            st.booleans(),
        ),
        min_size=1, max_size=12,
    ),
    st.integers(-10, 60),
)  # fmt: skip
def test_any_path_ends_and_tiles_its_window(rows: list[tuple[int, int, int, int, bool, bool]], begin: int) -> None:
    made = MakeCapture()
    for launch, before, length, stream, known, blocked in rows:
        start = launch + before
        if known:
            made.launched(Role.COMPUTE, launch, start, start + length, stream)
            made.wait(20 if stream == 7 else 7, stream, at=launch + 2)
        else:
            made.gpu(Role.EPLB_STATISTIC, start, start + length, stream)
        if blocked:
            made.call(launch, start + length, 10_000 + launch, "cudaDeviceSynchronize")
    capture = made.done()
    for row in range(len(capture.gpu)):
        end = int(capture.gpu["end"][row])
        path = critical_path(capture, row, min(begin, end))
        assert path.length == end - min(begin, end)
        edges = [edge for part in path.parts for edge in (part.start, part.end)]
        assert edges == sorted(edges)
        assert edges[1:-1:2] == edges[2::2]


def test_waits_are_edges_between_the_right_events() -> None:
    made = MakeCapture()
    made.launched(Role.COMPUTE, 0, 10, 20, 7)
    made.launched(Role.COMPUTE, 3, 20, 30, 7)
    made.wait(20, 7, at=6)
    made.launched(Role.COMPUTE, 10, 40, 50, 7)
    made.launched(Role.COMM, 13, 31, 45, 20)
    made.launched(Role.COMM, 16, 45, 46, 20)
    dependencies = Dependencies(made.done())
    starts = dependencies.capture.gpu["start"]
    assert [(int(starts[a]), int(starts[b])) for a, b in dependencies.waits.tolist()] == [(31, 20)]
    previous = {int(starts[row]): int(starts[p]) for row, p in enumerate(dependencies.previous.tolist()) if p >= 0}
    assert previous == {20: 10, 40: 20, 45: 31}
