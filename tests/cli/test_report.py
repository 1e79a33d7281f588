"""``eplbctl report``: the same tables for people and programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eplbctl.render import report as render
from moe_eplb.analysis.moves import LayerMoves
from moe_eplb.analysis.stages import BalanceRow, OverlapRow, Report, StageRow

from .conftest import Call, FakeSession, Write

REPORT = Report(
    stages=(StageRow("route", "main", 12, 1.25, 2.5, 3.0, 0.5),),
    moves=(LayerMoves(layer=3, slots=24, commits=2, moved_slots=5, bytes=12345, net_slots=4, cross_rank_net_slots=1),),
    balance=(BalanceRow(3, 0.5, 0.875),),
    overlap=(OverlapRow("balancer", 2.0, 1.5, 0.5, 0.75), OverlapRow("communication", 0.0, 0.0, 0.0, None)),
    violation="error[E101]: layer 0 route",
    incomplete="rank 1 dropped 3 records",
)


def test_text_has_every_table() -> None:
    text = render.text(REPORT)
    assert _cells(text) >= {"route", "12", "1.2", "12,345", "4 of 24", "0.500", "0.875", "75.0%", "-"}
    assert "First violation of the call order: error[E101]: layer 0 route" in text
    assert "Incomplete: rank 1 dropped 3 records" in text


def test_markdown_has_the_same_cells() -> None:
    markdown = render.markdown(REPORT, "quickstart: one")
    assert markdown.startswith("# quickstart: one\n\n## Stages, all ranks\n\n| kind")
    assert _cells(markdown.replace("|", " ")) >= _cells(render.text(REPORT)) - {"---"} - _rules(render.text(REPORT))


def test_json_is_the_report() -> None:
    data = json.loads(render.json_text(REPORT))
    assert data.pop("schema") == 1
    assert data == json.loads(json.dumps(dataclasses.asdict(REPORT)))


def test_tables_without_rows_are_left_out() -> None:
    empty = dataclasses.replace(REPORT, stages=(), moves=(), balance=(), overlap=(), violation="", incomplete="")
    assert render.text(empty) == "First violation of the call order: none"
    assert render.balance_and_moves(empty) == ""


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_a_run_folder_is_reported(form: str, call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--out", "one")
    answer = call("report", "one", "--format", form)
    assert answer.code == 0
    assert "the run left no trace" in answer.out


def test_what_is_no_run_folder_is_bad_input(call: Call) -> None:
    assert call("report", "nowhere").code == 2
    answer = call("report", ".")
    assert answer.code == 2
    assert "no run folder" in answer.err


def test_evidence_that_does_not_add_up_is_bad_input(call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--out", "one")
    row = {"row": "commit", "rank": 0, "layer": 0, "iteration": 0, "changed": 7, "bytes": "many"}
    with Path("one/evidence.rank0.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    answer = call("report", "one")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E058] one: ")


def _cells(text: str) -> set[str]:
    return {cell.strip() for line in text.splitlines() for cell in line.split("  ") if cell.strip()}


def _rules(text: str) -> set[str]:
    titles = {line for line in text.splitlines() if line and "  " not in line}
    return {cell for cell in _cells(text) if set(cell) == {"-"} and len(cell) > 1} | titles
