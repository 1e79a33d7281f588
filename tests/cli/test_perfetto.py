"""The file for ui.perfetto.dev: sound JSON, slices that nest, flows that meet, and our own reader reads it back."""

from __future__ import annotations

import json
from collections import defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from eplbctl.render import perfetto
from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.any import read_captures
from moe_eplb.analysis.roles import prepare
from tests.cli.html_captures import HOSTILE, hostile, large, report_on, small

GOOD = Path(__file__).parents[2] / "traces" / "good" / "two_ranks_gathered"


def written(capture: Capture) -> list[dict[str, Any]]:
    """The events of the file, with times as exact decimals."""
    text = perfetto.text(report_on(capture), capture)
    events: list[dict[str, Any]] = json.loads(text, parse_float=Decimal)["traceEvents"]
    return events


def of_phase(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def gpu_rows(capture: Capture, since: int) -> list[tuple[Any, ...]]:
    gpu = capture.gpu[capture.gpu["kind"] != c.UPDATER_WORK]
    columns = ("stream", "device", "correlation", "graph_node", "bytes", "kind")
    rest = zip(*(gpu[name].tolist() for name in columns), strict=True)
    times = zip((gpu["start"] - since).tolist(), (gpu["end"] - since).tolist(), gpu["name"].tolist(), strict=True)
    return sorted((s, e, capture.names[n], *more) for (s, e, n), more in zip(times, rest, strict=True))


def first_of(capture: Capture) -> int:
    tables = (capture.gpu, capture.calls, capture.ranges)
    return min(int(table["start"].min()) for table in tables if len(table))


@pytest.mark.parametrize("capture", [small(), large(500), prepare(read_captures([GOOD]))], ids=["small", "many", "run"])
def test_our_reader_reads_the_same_gpu_events_back(capture: Capture, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(perfetto.text(report_on(capture), capture))
    assert gpu_rows(read_captures([path]), 0) == gpu_rows(capture, first_of(capture))


def test_one_rank_is_stated_and_its_wall_clock_kept(tmp_path: Path) -> None:
    capture = large(10)
    late = capture.with_tables({"gpu": capture.gpu.copy()})
    late.gpu["start"] += 1_000_000_007
    late.gpu["end"] += 1_000_000_007
    late.gpu["rank"] = 3
    object.__setattr__(late, "utc", 5)
    path = tmp_path / "trace.json"
    path.write_text(perfetto.text(report_on(late), late))
    back = read_captures([path])
    assert (back.ranks, back.rank_source, back.utc) == ([3], "stated", 5 + 1_000_000_007)


def test_slices_of_a_track_nest() -> None:
    of_track = defaultdict(list)
    for event in of_phase(written(prepare(read_captures([GOOD]))), "X"):
        of_track[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(of_track) > 8
    for slices in of_track.values():
        open_ends: list[Decimal] = []
        for start, end in sorted(slices, key=lambda one: (one[0], -one[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def test_times_are_exact_and_begin_at_zero() -> None:
    capture = small()
    capture.gpu["start"][1] += 1
    events = of_phase(written(capture), "X")
    assert min(event["ts"] for event in events) == 0
    assert all(-event["ts"].as_tuple().exponent <= 3 for event in events if isinstance(event["ts"], Decimal))
    starts = {int(event["ts"] * 1000) for event in events if event.get("cat") == "kernel"}
    assert starts == set(capture.gpu["start"].tolist())


def test_every_launch_flows_to_one_kernel_that_comes_later() -> None:
    events = written(prepare(read_captures([GOOD])))
    begun = {event["id"]: event for event in of_phase(events, "s")}
    ended = of_phase(events, "f")
    assert len(begun) == len(of_phase(events, "s")) == len(ended) > 20
    slices = {(e["pid"], e["tid"], e["ts"]) for e in of_phase(events, "X")}
    for event in ended:
        launch = begun[event["id"]]
        assert event["bp"] == "e"
        assert launch["pid"] == event["pid"]
        assert launch["ts"] <= event["ts"]
        assert (launch["pid"], launch["tid"], launch["ts"]) in slices
        assert (event["pid"], event["tid"], event["ts"]) in slices


def test_tracks_are_named_with_whole_numbers() -> None:
    events = written(small())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in of_phase(events, "M") if e["name"] == "thread_name"}
    assert names[0, 7] == "Main 7"
    assert names[1, 9] == "MoeBalancer 9"
    assert names[2, 1000] == "check: call_order"
    processes = {e["pid"]: e["args"]["name"] for e in of_phase(events, "M") if e["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 1", 2: "eplbctl verdict"}
    for event in events:
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert event["ph"] == "M" or (event["pid"], event["tid"]) in names or event["ph"] == "C"


def test_verdicts_have_tracks_of_their_own() -> None:
    capture = small()
    report = report_on(capture)
    mine = [event for event in written(capture) if event["pid"] == 2]
    checks = {e["name"] for e in of_phase(mine, "X") if e["tid"] >= 1000}
    assert checks == {"call_order: invalid", "joins: valid", "complete: unknown"}
    stretches = [e for e in of_phase(mine, "X") if e["tid"] < 500]
    assert [int(e["dur"] * 1000) for e in stretches] == [one.length for one in report.exposed]
    assert stretches[0]["args"]["work"].startswith("hand_over: 10000 ns")
    (violation,) = of_phase(mine, "i")
    assert violation["name"] == "violation of call_order"
    assert violation["ts"] * 1000 == 100_000
    counted = [e for e in of_phase(mine, "C") if e["name"] == "balancer: exposed_us"]
    assert [e["args"]["exposed_us"] for e in counted] == [20, 20, 20]
    shares = [e for e in of_phase(mine, "C") if e["name"] == "balancer: hidden_share"]
    assert {float(e["args"]["hidden_share"]) for e in shares} == {0.666667}


def test_hostile_names_leave_the_file_sound() -> None:
    names = {event["name"] for event in written(hostile())}
    for kind, text in HOSTILE.items():
        if kind in ("long", "half"):
            continue
        assert text in names
    assert any(name.endswith("(10000 characters)") for name in names)
    assert any("half" in name and "\\ud800" in name for name in names)
