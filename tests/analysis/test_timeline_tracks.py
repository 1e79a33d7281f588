"""Tracks of a trace viewer: slices of one track nest or follow each other, and none is lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.perfetto import Track, nested_tracks, tracks
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture

TIMES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40)


def overlap_in_part(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[0] < a[1] < b[1] or b[0] < a[0] < b[1] < a[1]


@given(TIMES)
def test_slices_of_a_track_nest(pairs: list[tuple[int, int]]) -> None:
    made = sorted(((start, start + long) for start, long in pairs), key=lambda pair: (pair[0], -pair[1]))
    found = nested_tracks(*(np.array(column, np.int64) for column in zip(*made, strict=True))) if made else np.empty(0)
    assert len(found) == len(made)
    for i, one in enumerate(made):
        assert found[i] >= 0
        for j in range(i):
            assert found[i] != found[j] or not overlap_in_part(made[j], one)


def test_nested_ones_share_a_track_and_crossing_ones_do_not() -> None:
    start, end = np.array([0, 10, 20, 90]), np.array([100, 50, 30, 120])
    assert nested_tracks(start, end).tolist() == [0, 0, 0, 1]
    assert nested_tracks(start, end, most=1).tolist() == [0, 0, 0, c.UNKNOWN]


def named(made: list[Track]) -> dict[str, Track]:
    return {track.name: track for track in made}


def test_tracks_have_numbers_of_their_own_and_flows_end_once() -> None:
    make = MakeCapture()
    make.range("step", 0, 100, thread=7)
    launch = make.launched(Role.COMPUTE, 5, 20, 30, stream=7, thread=7)
    make.gpu(Role.COMPUTE, 30, 40, stream=7, correlation=launch)
    make.gpu(Role.COMPUTE, 35, 50, stream=7)
    make.gpu(Role.EPLB_MIGRATE, 60, 70, stream=254, kind=c.UPDATER_WORK)
    made, left_out = tracks(make.done(), 100)
    assert left_out == 0
    by_name = named(made)
    assert set(by_name) == {"stream 7", "stream 7 (2)", "updater", "host 1, thread 7"}
    assert by_name["stream 7"].number == 7
    assert len({track.number for track in made}) == 4
    assert sorted(track.order for track in made) == [0, 1, 2, 3]
    assert [one.flow for one in by_name["stream 7"].slices] == [0, None]
    assert [(one.name, one.flow) for one in by_name["host 1, thread 7"].slices] == [
        ("step", None),
        ("cudaLaunchKernel", 0),
    ]


def test_a_call_that_is_a_range_already_stands_once() -> None:
    make = MakeCapture()
    make.range("route/0", 5, 7, thread=1)
    make.launched(Role.COMPUTE, 5, 20, 30, stream=7, thread=1)
    made, _ = tracks(make.done(), 100)
    host = named(made)["host 1, thread 1"]
    assert [(one.name, one.flow) for one in host.slices] == [("route/0", 0)]
