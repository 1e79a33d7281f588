"""The content of pictures: nothing overlaps, nothing is lost in silence, and exposed time is that of the tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis import timeline_lanes
from moe_eplb.analysis.capture import ROLE_CODE, Capture, Table
from moe_eplb.analysis.intervals import length
from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.timeline import Timeline, make_timeline
from moe_eplb.analysis.timeline_data import timeline_data
from moe_eplb.analysis.timeline_lanes import MARKED, MOST_ROWS, NOT_CLOSED, RANGE_ROLE, rows_of
from moe_eplb.analysis.timeline_merge import merge_stretches
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture

TIMES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40)


def in_order(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    made = sorted(((start, start + long) for start, long in pairs), key=lambda pair: (pair[0], -pair[1]))
    return np.array([s for s, _ in made], np.int64), np.array([e for _, e in made], np.int64)


def assert_rows_are_disjoint(events: Table) -> None:
    for row in np.unique(events["row"]):
        mine = events[events["row"] == row]
        assert (mine["start"][1:] >= mine["end"][:-1]).all()


@given(TIMES)
def test_each_event_takes_the_first_free_row(pairs: list[tuple[int, int]]) -> None:
    start, end = in_order(pairs)
    rows = rows_of(start, end, most=100)
    for i, row in enumerate(rows.tolist()):
        taken = {rows[j] for j in range(i) if end[j] > start[i]}
        assert row == min(set(range(len(pairs) + 1)) - taken)


def test_what_finds_no_row_is_marked_and_told() -> None:
    make = MakeCapture()
    for number in range(MOST_ROWS + 3):
        make.gpu(Role.COMPUTE, number, 1000, 7)
    timeline = make_timeline(make.done())
    assert timeline.lanes[0].rows == MOST_ROWS
    assert timeline.drawn == timeline.events == MOST_ROWS
    assert f"3 events are left out where more than {MOST_ROWS} overlap" in timeline.notes[0]


def mixed() -> Capture:
    make = MakeCapture()
    for rank in (1, 0):
        make.stream(9, "MoeBalancer", rank)
        make.gpu(Role.COMPUTE, 100, 400, 7, "gemm", rank=rank, iteration=0, layer=0)
        make.gpu(Role.EPLB_STATISTIC, 150, 250, 9, "count", rank=rank, iteration=0, layer=0)
        make.gpu(Role.EPLB_SIGNAL, 380, 450, 9, "signal", rank=rank, iteration=0, layer=1)
        make.gpu(Role.COMPUTE, 500, 600, 7, "gemm", rank=rank, iteration=1, layer=0)
        make.gpu(Role.EPLB_MIGRATE, 550, 620, 9, "move", rank=rank, iteration=1, layer=1)
        make.gpu(Role.EPLB_MIGRATE, 300, 700, 254, "stage", rank=rank, kind=c.UPDATER_WORK, iteration=1, layer=1)
        make.range("step", 50, 650, domain="other", rank=rank)
        make.range("route/3", 100, 200, domain="moe_eplb", rank=rank, payload=12)
        make.range("open", 120, -1, domain="other", rank=rank)
        make.range("note", 130, 130, domain="other", rank=rank, kind=c.MARK)
        make.range("aten::add", 100, 110, domain="cpu_op", rank=rank, kind=c.OPERATOR)
    return make.done()


def test_lanes_stand_by_rank_the_main_stream_first_then_updater_and_host() -> None:
    timeline = make_timeline(mixed())
    seen = [(lane.rank, lane.kind.value, lane.name, lane.main) for lane in timeline.lanes]
    of_rank = [("stream", "stream 7", True), ("stream", "MoeBalancer", False), ("updater", "updater", False)]
    of_rank.append(("host", "host", False))
    assert seen == [(rank, *lane) for rank in (0, 1) for lane in of_rank]
    for lane in timeline.lanes:
        assert_rows_are_disjoint(lane.events)


def test_host_ranges_know_what_they_are() -> None:
    timeline = make_timeline(mixed())
    events = timeline.lanes[3].events
    by_name = {timeline.names[event["name"]]: event for event in events}
    assert set(by_name) == {"step", "route/3", "open", "note"}
    route = by_name["route/3"]
    assert (route["role"], route["layer"], route["iteration"]) == (ROLE_CODE[Role.COMPUTE], 3, 12)
    assert (by_name["step"]["role"], by_name["step"]["layer"]) == (RANGE_ROLE, -1)
    assert (by_name["open"]["flags"], by_name["open"]["end"]) == (NOT_CLOSED, timeline.last)
    assert by_name["note"]["flags"] == MARKED
    assert "2 operators" in timeline.notes[0]


def test_exposed_time_is_that_of_the_tables() -> None:
    capture = mixed()
    timeline, overlap = make_timeline(capture), measure(work_of_capture(capture), PAIRS["balancer"])
    assert sum(length(times) for times in timeline.exposed.values()) == overlap.whole.exposed == 2 * (50 + 20)
    heat = timeline.heat
    assert heat.layers == ((0, 0), (1, 1))
    assert heat.iterations == ((0, 0), (1, 1))
    assert heat.total_ns == ((200, None), (140, 140))
    assert heat.exposed_ns == ((0, None), (100, 40))


def test_a_selection_moves_the_view_and_the_marks_and_hides_nothing() -> None:
    timeline = make_timeline(mixed(), Selection(iterations=((1, 1),)))
    assert timeline.view == (300, 700)
    assert timeline.events == make_timeline(mixed()).events
    assert [times.tolist() for times in timeline.exposed.values()] == [[[600, 620]]] * 2
    assert timeline.heat.iterations == ((1, 1),)


def test_iterations_have_bounds() -> None:
    spans = make_timeline(mixed()).iterations
    assert [(one.number, one.start, one.end) for one in spans] == [(0, 100, 450), (1, 500, 620)]


def unpacked(data: dict, lane: dict) -> list[tuple[int, ...]]:
    """The inverse of `timeline_data`, written as the page does it."""
    rows, at = [], 0
    for number, count in enumerate(lane["rows"]):
        start = 0
        for i in range(at, at + count):
            start += lane["start"][i]
            begin = start + int(data["first"])
            layer, iteration = sum(lane["layer"][: i + 1]), sum(lane["iteration"][: i + 1])
            name = data["names"][lane["name_of"][i]]
            rows.append((number, begin, begin + lane["length"][i], name, lane["role"][i], layer, iteration))
        at += count
    return rows


def test_data_unpacks_to_the_lanes() -> None:
    timeline = make_timeline(mixed())
    data = timeline_data(timeline)
    for lane, packed in zip(timeline.lanes, data["lanes"], strict=True):
        columns = ("row", "start", "end", "name", "role", "layer", "iteration")
        rows = [tuple(row) for row in lane.events[list(columns)].tolist()]
        assert unpacked(data, packed) == [(r, s, e, timeline.names[n], *more) for r, s, e, n, *more in rows]
    strip = np.cumsum(data["exposed"][0]["times"]).reshape(-1, 2) + int(data["first"])
    assert strip.tolist() == timeline.exposed[0, 0].tolist()


def test_a_name_beyond_the_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_eplb.analysis.timeline_data.MOST_NAMES", 2)
    data = timeline_data(make_timeline(mixed()))
    assert len(data["names"]) == 3
    assert data["names"][-1] == "another name"
    assert any("another name" in note for note in data["notes"])


EVENTS = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 30), st.integers(0, 2), st.sampled_from(list(Role))),
    min_size=1, max_size=120,
)  # fmt: skip


@settings(max_examples=60)
@given(EVENTS, st.integers(6, 60))
# Rows that need a bucket longer than the whole span, which begins where one of that length would end.
@example(
    [(1, 0, stream, Role.COMPUTE) for stream in (0, 1)] + [(1, 1, 0, Role.COMPUTE)] * 4 + [(2, 0, 0, Role.COMPUTE)], 6
)
def test_merging_keeps_every_event_and_the_order(events: list[tuple[int, int, int, Role]], most: int) -> None:
    make = MakeCapture()
    for start, long, stream, role in events:
        make.gpu(role, start, start + long, stream, name=role.value)
    capture = make.done()
    whole, less = make_timeline(capture), make_timeline(capture, most_events=most)
    rows = sum(lane.rows for lane in whole.lanes)
    assert less.drawn == sum(len(lane.events) for lane in less.lanes) <= max(most, rows)
    assert sum(int(lane.events["count"].sum()) for lane in less.lanes) == whole.events == less.events
    assert (less.bucket_ns > 0) == (whole.drawn > most)
    assert bool(less.bucket_ns) == any("are merged" in note for note in less.notes)
    for lane, before in zip(less.lanes, whole.lanes, strict=True):
        assert_rows_are_disjoint(lane.events)
        for one in lane.events:
            inside = before.events[
                (before.events["row"] == one["row"]) & (before.events["start"] >= one["start"])
                & (before.events["end"] <= one["end"])
            ]  # fmt: skip
            assert len(inside) >= one["count"]


def test_a_merged_entry_has_the_longest_name_and_the_role_with_most_time() -> None:
    make = MakeCapture()
    for start, end, role, name in ((0, 2, Role.COMM, "a"), (2, 4, Role.COMM, "b"), (4, 7, Role.COMPUTE, "c")):
        make.gpu(role, start, end, name=name, layer=3, iteration=start)
    timeline = make_timeline(make.done(), most_events=1)
    event = timeline.lanes[0].events[0]
    assert (event["count"], event["start"], event["end"], timeline.bucket_ns) == (3, 0, 7, 8)
    assert (timeline.names[event["name"]], event["role"]) == ("c", ROLE_CODE[Role.COMM])
    assert (event["layer"], event["iteration"]) == (3, c.UNKNOWN)


def test_the_same_capture_gives_the_same_picture() -> None:
    one, other = (timeline_data(make_timeline(mixed(), most_events=5)) for _ in range(2))
    assert one == other


def test_stretches_that_are_too_many_become_fewer() -> None:
    times = np.array([[n * 10, n * 10 + 5] for n in range(100)], np.int64)
    merged, gap = merge_stretches({(0, 0): times}, 20)
    assert len(merged[0, 0]) <= 20
    assert gap == 8
    assert merged[0, 0][0, 0] == 0
    assert merged[0, 0][-1, 1] == 995


def test_lanes_beyond_the_limit_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_lanes, "MOST_LANES", 2)
    timeline = make_timeline(mixed())
    assert len(timeline.lanes) == 2
    assert any("6 lanes with the fewest events are left out" in note for note in timeline.notes)


def empty(timeline: Timeline) -> bool:
    return not timeline.lanes and not timeline.exposed and not timeline.iterations


def test_a_capture_without_anything_has_a_picture() -> None:
    nothing = replace(MakeCapture().done())
    timeline = make_timeline(nothing)
    assert empty(timeline)
    assert timeline_data(timeline)["names"] == []


def test_a_span_that_no_browser_can_count_is_refused() -> None:
    make = MakeCapture()
    make.gpu(Role.COMPUTE, 0, 1 << 53)
    with pytest.raises(TraceError) as caught:
        make_timeline(make.done())
    assert caught.value.code == "E075"
