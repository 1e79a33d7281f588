"""The report's tables on the miniature run, whose numbers can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.analysis.run_folder import load
from moe_eplb.analysis.stages import make_report
from moe_eplb.core.events import Kind
from tests.support.run_folders import good_run


def test_report_of_a_good_run(tmp_path: Path) -> None:
    report = make_report(load(good_run().write(tmp_path)))
    stages = {(row.name, row.stream): row for row in report.stages}
    route = stages["route", "host"]
    assert (route.calls, route.p50_us, route.p99_us) == (16, 0.03, 0.03)
    assert route.total_ms == pytest.approx(16 * 30e-6)
    assert stages["route", "Main"].calls == 16
    assert stages["start_wait_gpu_stage", "MoeBalancer"].p50_us == 0.06
    assert stages["stage_weights", "updater"].calls == 6
    assert [(row.commits, row.moved_slots, row.bytes) for row in report.moves] == [(2, 5, 960), (1, 2, 384)]
    assert [row.layer for row in report.balance] == [0, 1]
    assert all(0 < value <= 1 for row in report.balance for value in (row.static_start, row.now))
    assert (report.violation, report.incomplete) == ("", "")


def test_net_moves_forget_what_came_back(tmp_path: Path) -> None:
    run = good_run()
    first = run.find("placement", rank=0, layer=0, iteration=0)[0]
    for row in run.find("placement", layer=0, iteration=3):
        row.update(digest=first["digest"], slots=first["slots"])
    moves = make_report(load(run.write(tmp_path))).moves
    assert [(row.moved_slots, row.net_slots, row.cross_rank_net_slots) for row in moves] == [(5, 0, 0), (2, 2, 2)]


def test_a_report_without_a_trace_has_no_times(tmp_path: Path) -> None:
    good_run().write(tmp_path)
    (tmp_path / "trace.sqlite").unlink()
    report = make_report(load(tmp_path))
    assert report.stages == ()
    assert report.incomplete == "the run left no trace"
    assert len(report.moves) == 2


def test_the_first_violation_is_shown_with_its_neighbours(tmp_path: Path) -> None:
    run = good_run()
    (gone,) = run.find_records(Kind.DONE_WAIT_GPU_STAGE, host=True, rank=1, layer=0, iteration=2)
    run.records.remove(gone)
    violation = make_report(load(run.write(tmp_path))).violation
    assert violation.startswith("rank 1, record ")
    assert "start_wait_gpu_stage layer 0 iteration 2\n  > this call" in violation
