"""Traces of the PyTorch profiler: exact times, every kernel known, and batches that are cut where events end."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.ranges import Launches, project
from moe_eplb.analysis.readers import json_events
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.readers.chrome import read_chrome
from moe_eplb.analysis.readers.json_events import EventText, last_cut
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS
from moe_eplb.analysis.roles import prepare, unknown_names
from tests.analysis.profiler_traces import COMPUTE, MAIN_THREAD, MOVING, WAITING, expert_parallel


def _file(path: Path, times: list[tuple[str, str]]) -> Path:
    """A trace with kernels whose `ts` and `dur` stand there as given."""
    events = ",\n".join(
        f'{{"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": {ts}, "dur": {dur},'
        f' "args": {{"stream": 7, "device": 0, "correlation": {number + 1}}}}}'
        for number, (ts, dur) in enumerate(times)
    )
    path.write_text(f'{{"traceEvents": [{events}]}}')
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_an_expert_parallel_trace_as_a_whole(tmp_path: Path, packed: bool) -> None:
    made = expert_parallel(rank=3)
    capture = prepare(read_capture(made.write(tmp_path / ("t.json.gz" if packed else "t.json"))))
    kernels = [event for event in made.events if event["cat"] == "kernel"]
    assert len(capture.gpu) == len(kernels)
    assert sorted(capture.gpu["start"].tolist()) == sorted(event["ts"] * 1000 for event in kernels)
    assert capture.ranks == [3]
    assert capture.rank_source == "stated"
    assert (capture.gpu["end"] > capture.gpu["start"]).all()
    assert unknown_names(capture, capture.gpu["role"]) == []
    expected = dict.fromkeys(COMPUTE, "compute") | dict.fromkeys(MOVING, "comm") | dict.fromkeys(WAITING, "comm_wait")
    for row in capture.gpu:
        name = capture.names[row["name"]]
        assert c.ROLES[row["role"]].value == expected.get(name, "other"), name


def test_work_that_another_thread_launched_has_its_layer_and_iteration(tmp_path: Path) -> None:
    capture = prepare(read_capture(expert_parallel(layers=3, steps=2).write(tmp_path / "t.json")))
    backward = capture.calls["thread"][Launches(capture).call] != MAIN_THREAD
    assert backward.sum() == len(capture.gpu) // 2
    assert set(capture.gpu["layer"].tolist()) == {0, 1, 2}
    assert set(capture.gpu["iteration"].tolist()) == {0, 1}
    own = {one.name: one.events for one in project(capture)}
    any_thread = {one.name: one.events for one in project(capture, any_thread=True)}
    step = "user_annotation:ProfilerStep#0"
    assert (own[step], any_thread[step]) == (len(capture.gpu) // 4, len(capture.gpu) // 2)


def test_whole_and_fractional_microseconds_are_exact(tmp_path: Path) -> None:
    times = [("5", "1"), ("6.001", "0.999"), ("8796093022207.123", "0.001"), ("1713389347587284.001", "2.007")]
    capture = read_chrome(_file(tmp_path / "t.json", times))
    expected = sorted((int(Decimal(ts) * 1000), int((Decimal(ts) + Decimal(dur)) * 1000)) for ts, dur in times)
    assert list(zip(capture.gpu["start"].tolist(), capture.gpu["end"].tolist(), strict=True)) == expected


_MICROSECONDS = st.decimals(min_value=0, max_value=4_000_000_000_000_000, places=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(_MICROSECONDS, st.decimals(min_value=0, max_value=10**7, places=3)), min_size=1, max_size=6))
def test_any_three_decimals_are_exact(tmp_path_factory: pytest.TempPathFactory, times: list[tuple[Any, Any]]) -> None:
    path = _file(tmp_path_factory.mktemp("t") / "t.json", [(f"{ts:f}", f"{dur:f}") for ts, dur in times])
    capture = read_chrome(path)
    expected = sorted((int(ts * 1000), -int((ts + dur) * 1000)) for ts, dur in times)
    assert list(zip(capture.gpu["start"].tolist(), (-capture.gpu["end"]).tolist(), strict=True)) == expected


def test_times_in_texts_are_no_times(tmp_path: Path) -> None:
    path = _file(tmp_path / "t.json", [("1713389347587284.001", "1.5")])
    text = path.read_text().replace('"name": "k"', '"name": "a \\"ts\\": 12.5, b"')
    path.write_text(text)
    capture = read_chrome(path)
    assert capture.names[capture.gpu["name"][0]] == 'a "ts": 12.5, b'
    assert capture.gpu["start"].tolist() == [1713389347587284001]


def test_a_bare_array_is_a_trace_too(tmp_path: Path) -> None:
    made = expert_parallel()
    path = tmp_path / "t.json"
    path.write_text(json.dumps(made.events))
    capture = read_capture(path)
    assert len(capture.gpu) == sum(event["cat"] == "kernel" for event in made.events)
    assert "the trace does not state its rank" in capture.notes


def test_what_stands_behind_the_events_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    events = json.dumps(expert_parallel().events)
    path.write_text(f'{{"a": "traceEvents\\": [", "traceEvents" : {events}, "distributedInfo": {{"rank": 6}} }}')
    assert read_capture(path).ranks == [6]


def test_wall_clock_of_time_zero(tmp_path: Path) -> None:
    path = _file(tmp_path / "t.json", [("5", "1")])
    path.write_text('{"baseTimeNanoseconds": 1700000000000000000, ' + path.read_text()[1:])
    assert read_chrome(path).utc == 1_700_000_000_000_000_000
    assert read_chrome(_file(path, [("1713389347587284", "1")])).utc == 0
    assert read_chrome(_file(path, [("5", "1")])).utc is None


def test_unread_categories_are_said(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    made = expert_parallel()
    made.slice("mtia_ccp_events", "x", 1, 1, 1)
    assert read_capture(made.write(path)).notes == ("1 events of category mtia_ccp_events are not read",)


# -- batches -------------------------------------------------------------------------------------------------------

_TEXT = st.text(alphabet='ab"\\{}[],: \n', max_size=8)
_VALUE = st.recursive(
    _TEXT | st.integers(-5, 5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_EVENTS = st.lists(st.dictionaries(_TEXT, _VALUE, min_size=1, max_size=3), max_size=12)


@settings(max_examples=150, deadline=None)
@given(_EVENTS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_batches_together_are_the_whole_array(
    tmp_path_factory: pytest.TempPathFactory, events: list[Any], piece: int, indent: int | None, packed: bool
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.json"
    text = json.dumps({"head": {"x": [1]}, "traceEvents": events, "tail": [{"y": "]}"}]}, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    stream = EventText(path, DEFAULT_LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_events, "_PIECE", piece)
        read = [event for _, batch in stream.batches() for event in batch]
    assert read == events
    assert stream.about == {"head": {"x": [1]}, "tail": [{"y": "]}"}]}


@settings(max_examples=150, deadline=None)
@given(_EVENTS, st.data())
def test_the_exact_cut_ends_behind_the_last_whole_event(events: list[Any], data: st.DataObject) -> None:
    text = ", ".join(map(json.dumps, events))
    ends = [0, *np.cumsum([len(json.dumps(event)) + 2 for event in events]).tolist()]
    whole = [end - 2 for end in ends[1:]]
    shown = data.draw(st.integers(0, len(text)))
    cut, ended = last_cut(text[:shown].encode())
    assert (cut, ended) == (max((end for end in whole if end <= shown), default=0), False)
    assert last_cut(f"{text}]}}".encode()) == (len(text), True)


def test_an_unended_text_costs_no_more_than_its_length() -> None:
    assert last_cut(b'{"a": "' + b'\\"' * 2_000_000) == (0, False)
