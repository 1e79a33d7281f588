"""Graph replays that were traced as a whole: nobody knows what ran in them, which leaves overlap unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eplbctl.cli import invoke
from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLES, Capture
from moe_eplb.analysis.exposed import exposed_times
from moe_eplb.analysis.overlap import PAIRS, Hidden, measure
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.report_metrics import report_measures
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.analysis.writers.sqlite import write_sqlite
from moe_eplb.core.events import Role

from .captures import MakeCapture
from .nsys_files import PROCESS, NsysFile

UNKNOWN_PAIR = {"total_ns": None, "hidden_ns": None, "exposed_ns": None, "overlap": None}


def _export(path: Path) -> Path:
    """A count of the balancer beside a replay from 900 to 2500, and some compute after it."""
    file = NsysFile()
    file.range("step 0", 0, 200)
    for number, name in enumerate(("cudaLaunchKernel", "cudaGraphLaunch", "cudaLaunchKernel"), 1):
        file.call(100 + 20 * number, 110 + 20 * number, number, name=name)
    file.kernel("_histogram", 1000, 2000, 1, stream=20)
    file.kernel("sm90_xmma_gemm", 3000, 3001, 3)
    file.add(
        "CUPTI_ACTIVITY_KIND_GRAPH_TRACE", start=900, end=2500, deviceId=0, streamId=7, correlationId=2,
        globalPid=PROCESS, graphId=1,
    )  # fmt: skip
    return file.write(path)


def test_a_whole_replay_is_unknown_time_of_its_iteration(tmp_path: Path) -> None:
    capture = prepare(read_capture(_export(tmp_path / "t.sqlite")))
    (graph,) = capture.gpu[capture.gpu["kind"] == c.GRAPH]
    assert (graph["start"], graph["end"], graph["stream"], graph["iteration"]) == (900, 2500, 7, 0)
    assert ROLES[graph["role"]] is Role.UNKNOWN
    assert "--cuda-graph-trace=node" in capture.incomplete
    report = make_trace_report(capture)
    assert report.idle[0].idle_ns == 500
    assert report_measures(report).single["unknown.share"] == pytest.approx(1600 / 2601)
    assert report.stall is None
    assert report.path is not None
    assert not report.path.waits_known


def test_what_may_hide_in_a_replay_leaves_overlap_and_what_is_exposed_unknown(tmp_path: Path) -> None:
    capture = prepare(read_capture(_export(tmp_path / "t.sqlite")))
    report = make_trace_report(capture)
    assert not any(pair.known for pair in report.pairs.values())
    assert all(pair.whole == Hidden() and not pair.worst for pair in report.pairs.values())
    assert report.exposed == ()
    measures = report_measures(report)
    assert measures.values("overlap.balancer") == measures.values("exposed.p95_us") == []
    assert all(len(times) == 0 for times in exposed_times(capture, PAIRS["balancer"]).values())


def test_the_command_line_says_null_and_how_to_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_export(tmp_path / "t.sqlite"))
    assert invoke(["report", path, "--format", "json", "--fail-if", "exposed.max_us > 1"]) == 3
    overlap = json.loads(capsys.readouterr().out)["trace"]["overlap"]
    assert [pair[part] for pair in overlap.values() for part in ("whole", "updates", "steady")] == [
        UNKNOWN_PAIR
    ] * 3 * len(PAIRS)
    assert invoke(["report", path]) == 0
    text = capsys.readouterr().out
    assert "A dash: unknown." in text
    assert "--cuda-graph-trace=node" in text


@pytest.mark.parametrize("suffix", ["sqlite", "json"])
def test_a_converted_trace_keeps_its_replays(tmp_path: Path, suffix: str) -> None:
    source, target = _export(tmp_path / "t.sqlite"), tmp_path / f"converted.{suffix}"
    assert invoke(["trace", "convert", str(source), "-o", str(target)]) == 0
    before, after = (prepare(read_capture(path)) for path in (source, target))
    for column in ("start", "end", "stream", "kind", "role", "iteration"):
        assert after.gpu[column].tolist() == before.gpu[column].tolist()
    assert after.incomplete == before.incomplete


def _two_ranks() -> Capture:
    made = MakeCapture()
    for rank in (0, 1):
        made.gpu(Role.COMPUTE, 0, 100, 7, rank=rank)
        made.gpu(Role.EPLB_STATISTIC, 50, 150, 20, rank=rank)
    made.gpu(Role.UNKNOWN, 100, 200, 7, rank=1, kind=c.GRAPH)
    return made.done()


def test_a_rank_whose_graphs_were_traced_as_a_whole_takes_only_itself_out() -> None:
    capture = _two_ranks()
    assert measure(work_of_capture(capture), PAIRS["balancer"]).ranks == {0: Hidden(100, 50)}
    assert not make_trace_report(capture).pairs["balancer"].known
    seen = make_trace_report(capture, Selection(ranks=((0, 0),))).pairs["balancer"]
    assert (seen.known, seen.whole) == (True, Hidden(100, 50))


def test_replays_read_back_as_they_were_written(tmp_path: Path) -> None:
    capture = read_capture(_export(tmp_path / "t.sqlite"))
    for name in ("once.sqlite", "twice.sqlite"):
        write_sqlite(capture, tmp_path / name)
        again = read_capture(tmp_path / name)
        assert again.incomplete == capture.incomplete
        assert again.gpu["role"].tolist() == capture.gpu["role"].tolist()
        capture = again
