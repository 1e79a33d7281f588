"""A run folder whose run replayed graphs is judged and reported like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_eplb.core.events import Kind
from tests.support.graph_runs import graph_run

from .conftest import Call


def test_verify_judges_it(call: Call, tmp_path: Path) -> None:
    done = call("verify", str(graph_run().write(tmp_path / "run")), "--format", "json")
    assert done.code == 0, done.err
    assert '"graph_order"' in done.out


def test_report_finds_its_calls_legal(call: Call, tmp_path: Path) -> None:
    done = call("report", str(graph_run().write(tmp_path / "run")), "--strict")
    assert done.code == 0, done.out + done.err
    (row,) = (line for line in done.out.splitlines() if line.startswith("call_order"))
    assert "6 iterations replay a graph" in row


@pytest.mark.parametrize("form", ["json", "markdown", "junit", "html", "svg", "png", "perfetto"])
def test_report_has_it_in_every_form(form: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / f"report.{form}"
    done = call("report", str(graph_run().write(tmp_path / "run")), "--format", form, "-o", str(path))
    assert (done.code, path.stat().st_size > 100) == (0, True), done.err
    if form == "json":
        assert {check["name"]: check["status"] for check in json.loads(path.read_text())["trace"]["checks"]} == {
            "call_order": "valid", "joins": "valid", "times": "valid", "complete": "valid", "graph_order": "valid",
            "clocks": "valid", "waits_not_work": "valid",
        }  # fmt: skip


def test_an_iteration_without_its_replay_ends_both_with_1(call: Call, tmp_path: Path) -> None:
    run = graph_run()
    for record in run.find_records(Kind.REPLAY, host=True, iteration=2):
        run.records.remove(record)
    folder = str(run.write(tmp_path / "run"))
    for verb in ("verify", "report"):
        done = call(verb, folder)
        assert done.code == 1, done.out
        assert "Traceback" not in done.err
