"""``eplbctl report`` and ``eplbctl compare``: the same tables for people and programs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import junitparser
import pytest

from eplbctl.render import report as render
from eplbctl.render.run_tables import balance_and_moves
from eplbctl.render.tables import escaped
from moe_eplb.analysis import stages
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.moves import LayerMoves, PlanWaits
from moe_eplb.analysis.report import Report
from moe_eplb.analysis.stages import BalanceRow, StageRow

from .conftest import Call, FakeSession, Write

ROOT = Path(__file__).resolve().parents[2]
GOOD = ROOT / "traces" / "good" / "two_ranks_gathered"

RUN = stages.Report(
    stages=(StageRow("route", "main", 12, 1.25, 2.5, 3.0, 0.5),),
    moves=(LayerMoves(layer=3, slots=24, commits=2, moved_slots=5, bytes=12345, net_slots=4, cross_rank_net_slots=1),),
    balance=(BalanceRow(3, 0.5, 0.875),),
    violation="error[E101]: layer 0 route",
    incomplete="rank 1 dropped 3 records",
)
REPORT = Report("quickstart", RUN, None, None, Measures())


def test_text_has_every_table_of_a_run() -> None:
    text = render.text(REPORT)
    assert _cells(text) >= {"route", "12", "1.2", "12,345", "4 of 24", "0.500", "0.875"}
    assert "First violation of the call order: error[E101]: layer 0 route" in text
    assert "Incomplete: rank 1 dropped 3 records" in text


@pytest.mark.parametrize(
    ("waits", "told"), [(None, False), (PlanWaits(8, 0, 0.05), False), (PlanWaits(8, 3, 1.26), True)]
)
def test_plans_that_were_waited_for_are_told_with_a_way_out(waits: PlanWaits | None, told: bool) -> None:
    text = render.text(dataclasses.replace(REPORT, run=dataclasses.replace(RUN, waits=waits)))
    hint = "Waited for 3 of 8 plans, 1.3 ms at most: with a larger balancer.commit_delay they have more time"
    assert (hint in text) == told
    assert ("Waited for" in text) == told


def test_markdown_has_the_same_cells() -> None:
    markdown = render.markdown(REPORT)
    assert markdown.startswith("# quickstart\n\n## Stages, all ranks\n\n| kind")
    assert _cells(markdown.replace("\\", "").replace("|", " ")) >= _cells(render.text(REPORT)) - {"---"} - _rules(
        render.text(REPORT)
    )


_HOSTILE = "<img src=x onerror=alert(1)>[a](javascript:b) `c` |d| &lt;"


def _hostile_trace(folder: Path) -> Path:
    """Names that would be elements, links and code of Markdown, in a kernel, a category, a file and what is missing."""
    common = {"ph": "X", "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    kernel = common | {"cat": "kernel", "name": f"k {_HOSTILE}", "args": {"stream": 7, "device": 0}}
    other = common | {"cat": _HOSTILE, "name": "o"}
    path = folder / "a <b> [c](d).json"
    path.write_text(json.dumps({"traceEvents": [kernel, other], "eplb_incomplete": f"# lost {_HOSTILE}"}))
    return path


@pytest.mark.parametrize("command", [("report",), ("trace", "info")], ids=" ".join)
def test_markdown_shows_what_a_trace_says_as_it_is(command: tuple[str, ...], call: Call, tmp_path: Path) -> None:
    answer = call(*command, str(_hostile_trace(tmp_path)), "--format", "markdown")
    assert "img src=x" in answer.out
    assert "a \\<b\\> \\[c\\](d).json" in answer.out
    assert re.findall(r"(?<!\\)(?:\\\\)*[<>\[\]`&]", answer.out) == []


def test_markdown_begins_no_heading_or_list_with_a_name() -> None:
    lines = ["# a", "  - b", "1. c", "2) d", "+ e", "=== f", "plain 1. g"]
    assert escaped("\n".join(lines)).split("\n") == [
        "\\# a", "  \\- b", "1\\. c", "2\\) d", "\\+ e", "\\=== f", "plain 1. g",
    ]  # fmt: skip


def test_json_is_the_report() -> None:
    data = json.loads(render.json_text(REPORT))
    assert (data.pop("schema"), data.pop("name"), data.pop("trace")) == (1, "quickstart", None)
    assert data == json.loads(json.dumps(dataclasses.asdict(RUN)))


def test_tables_without_rows_are_left_out() -> None:
    empty = dataclasses.replace(RUN, stages=(), moves=(), balance=(), violation="", incomplete="")
    assert render.text(dataclasses.replace(REPORT, run=empty)) == "First violation of the call order: none"
    assert balance_and_moves(empty) == ""


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


def test_a_real_run_is_reported_with_its_trace(call: Call) -> None:
    answer = call("report", str(GOOD))
    assert answer.code == 0, answer.err
    titles = ("Stages, all ranks", "Moves", "Balancedness", "Checks", "Overlap", "Device time by role", "Idle time")
    for title in titles:
        assert re.search(f"^{title}", answer.out, re.MULTILINE), title
    assert "2 ranks, 2 devices, 4 iterations, 2 layers" in answer.out
    assert "Stall of the main streams: unknown" in answer.out


def test_json_of_a_real_run(call: Call) -> None:
    data = json.loads(call("report", str(GOOD), "--format", "json").out)
    trace = data["trace"]
    assert trace["ranks"] == [0, 1]
    whole = trace["overlap"]["statistic"]["whole"]
    assert whole["hidden_ns"] + whole["exposed_ns"] == whole["total_ns"] > 0
    assert sum(part["total_ns"] for part in trace["overlap"]["statistic"]["ranks"]) == whole["total_ns"]
    assert trace["overlap"]["reduction"]["whole"]["overlap"] is None
    assert trace["stall"] is None
    assert trace["metrics"]["stall.p50_us"] is None
    assert trace["metrics"]["balancedness.min"] > 0
    assert "NaN" not in json.dumps(trace)


@pytest.mark.parametrize("option", [("--iterations", "1-2"), ("--rank", "1"), ("--layer", "0")])
def test_a_part_of_a_trace(call: Call, option: tuple[str, str]) -> None:
    whole = json.loads(call("report", str(GOOD), "--format", "json").out)["trace"]
    part = json.loads(call("report", str(GOOD), "--format", "json", *option).out)["trace"]
    assert 0 < part["events"] < whole["events"]
    assert part["selection"]
    name = {"--iterations": "iterations", "--rank": "ranks", "--layer": "layers"}[option[0]]
    key = name.removesuffix("s")
    for row in part["overlap"]["balancer"][name]:
        assert row in whole["overlap"]["balancer"][name], key


@pytest.mark.parametrize(
    ("condition", "code"),
    [("exposed.max_us > 1e9", 0), ("exposed.max_us > 0.001", 1), ("stall.p50_us > 1e9", 3), ("moves.slots < 1", 0)],
)
def test_conditions_decide_the_exit_code(call: Call, condition: str, code: int) -> None:
    answer = call("report", str(GOOD), "--fail-if", condition)
    assert answer.code == code
    assert f"limit {condition.split()[0]}" in answer.out


def test_the_worst_of_several_conditions_counts(call: Call) -> None:
    limits = ("--fail-if", "exposed.max_us > 0.001", "--fail-if", "stall.p50_us > 1")
    assert call("report", str(GOOD), *limits).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        ((), 2, "Missing argument"),
        (("nowhere.sqlite",), 2, "E060"),
        ((str(GOOD), "--fail-if", "exposed > 3"), 2, "E081"),
        ((str(GOOD), "--iterations", "x"), 2, "E080"),
        ((str(GOOD), "--iterations", "5000"), 2, "its iterations are 0 to 3"),
        ((str(GOOD), "--rank", "2-"), 2, "its ranks are 0 to 1"),
        ((str(GOOD), "--iterations", "1", "--layer", "3"), 2, "nothing in the trace has iterations 1, layers 3"),
        ((str(GOOD), "--roles", "nowhere.yaml"), 2, "nowhere.yaml"),
        ((str(GOOD), "--format", "png"), 2, "E083"),
        ((str(GOOD), str(GOOD)), 2, "E066"),
        ((str(GOOD), "--top", "-1"), 2, "--top"),
        ((str(GOOD / "scenario.yaml"),), 2, "E060"),
    ],
)
def test_wrong_input(call: Call, arguments: tuple[str, ...], code: int, what: str) -> None:
    answer = call("report", *arguments)
    assert answer.code == code
    assert what in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err


def test_junit_and_github(call: Call, tmp_path: Path) -> None:
    limits = ("--fail-if", "exposed.max_us > 0.001", "--fail-if", "stall.p50_us > 1", "--fail-if", "moves.slots < 1")
    junit = call("report", str(GOOD), *limits, "--format", "junit")
    suites = junitparser.JUnitXml.fromstring(junit.out)
    (suite,) = suites
    found = {case.name: [type(result).__name__ for result in case.result] for case in suite}
    assert found["limit exposed.max_us"] == ["Failure"]
    assert found["limit stall.p50_us"] == ["Error"]
    assert found["limit moves.slots"] == []
    github = call("report", str(GOOD), *limits, "--format", "github").out
    assert "::error file=" in github
    assert "title=tiny%3A limit exposed.max_us is invalid" in github


def test_html_and_perfetto_are_written_to_files(call: Call, tmp_path: Path) -> None:
    assert call("report", str(GOOD), "--format", "html", "-o", str(tmp_path / "r.html")).code == 0
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")
    assert "tiny" in page
    assert call("report", str(GOOD), "--format", "perfetto", "-o", str(tmp_path / "r.json")).code == 0
    assert json.loads((tmp_path / "r.json").read_text())["traceEvents"]


def test_one_trace_is_the_same_as_itself(call: Call) -> None:
    answer = call("compare", str(GOOD), str(GOOD), "--min-iterations", "4")
    assert answer.code == 0, answer.err
    assert "exposed" in answer.out
    assert "worse" not in answer.out


def test_too_few_iterations_are_unknown(call: Call) -> None:
    answer = call("compare", str(GOOD), str(GOOD))
    assert answer.code == 3
    assert "too few iterations" in answer.out


def test_compare_as_files_for_programs(call: Call) -> None:
    few = (str(GOOD), str(GOOD), "--min-iterations", "4", "--gate", "exposed", "--gate", "step")
    data = json.loads(call("compare", *few, "--format", "json").out)
    assert [check["name"] for check in data["checks"]] == ["compare step", "compare exposed"]
    assert {row["layer"] for row in data["compared"]} == {-1, 0, 1}
    assert call("compare", *few, "--format", "markdown").out.startswith("# ")
    (suite,) = junitparser.JUnitXml.fromstring(call("compare", *few, "--format", "junit").out)
    assert len(list(suite)) == 2
    assert "::notice title=eplbctl compare::1 of 1" in call("compare", *few, "--format", "github").out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((str(GOOD),), "Missing argument"),
        ((str(GOOD), "nowhere"), "nowhere"),
        ((str(GOOD), str(GOOD), "--gate", "speed"), "E082"),
        ((str(GOOD), str(GOOD), "--tolerance", "-1"), "--tolerance"),
        ((str(GOOD), str(GOOD), "--min-iterations", "1"), "--min-iterations"),
    ],
)
def test_wrong_input_of_compare(call: Call, arguments: tuple[str, ...], what: str) -> None:
    answer = call("compare", *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert what in answer.err


@pytest.mark.parametrize("kind", ["run folder", "export"])
def test_reporting_needs_no_torch_and_starts_quickly(call: Call, tmp_path: Path, kind: str) -> None:
    trace = GOOD
    if kind == "export":
        trace = tmp_path / "t.sqlite"
        assert call("trace", "convert", str(GOOD), "-o", str(trace)).code == 0
    program = (
        "import sys, resource\n"
        "from eplbctl.cli import invoke\n"
        f"code = invoke(['report', {str(trace)!r}])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
        "heavy = {'torch', 'triton', 'pandas', 'transformers', 'matplotlib', 'nvtx', 'numba', 'scipy'}\n"
        "heavy |= {'pydantic', 'moe_eplb.core.scenario'} if 'sqlite' in sys.argv[-1] else set()\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    # One thread of numpy's own, as on a machine of one core, and compiled files as an installed package has them.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    done = [
        subprocess.run(
            [sys.executable, "-c", program, str(trace)], capture_output=True, text=True, timeout=60, check=True,
            cwd=ROOT, env=environment,
        )
        for _ in range(4)
    ]  # fmt: skip
    lines = [run.stderr.splitlines() for run in done]
    assert {line[-1] for line in lines} == {"[]"}
    # Processor time: another program on the machine hardly lengthens it.
    assert min(float(line[-2]) for line in lines) < (0.7 if kind == "run folder" else 0.5)


def _cells(text: str) -> set[str]:
    return {cell.strip() for line in text.splitlines() for cell in line.split("  ") if cell.strip()}


def _rules(text: str) -> set[str]:
    titles = {line for line in text.splitlines() if line and "  " not in line}
    return {cell for cell in _cells(text) if set(cell) == {"-"} and len(cell) > 1} | titles
