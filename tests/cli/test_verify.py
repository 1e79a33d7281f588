"""``eplbctl verify``: selection, one verdict out of many, and output that other programs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import junitparser
import pytest

from moe_eplb.core.errors import RunFailed
from moe_eplb.core.verdict import CheckResult, Status

from .conftest import INVALID, UNKNOWN, VALID, Call, FakeSession, Write, verdict_of


@pytest.fixture
def four(write: Write, session: FakeSession) -> FakeSession:
    """Four scenarios, each with another end."""
    for name in ("good", "open", "bad", "dead"):
        write(name)
    session.planned = {
        "open": verdict_of(VALID, UNKNOWN),
        "bad": verdict_of(VALID, INVALID),
        "dead": verdict_of(VALID, failure="error[E180]: rank 1 died\n  why: killed by signal 9"),
    }
    return session


def _ran(session: FakeSession) -> list[str]:
    return [scenario.name for scenario, _ in session.ran]


def test_the_default_is_the_scenarios_folder(call: Call, four: FakeSession) -> None:
    assert call("verify").code == 4
    assert _ran(four) == ["bad", "dead", "good", "open"]


@pytest.mark.parametrize(
    ("names", "code"), [(["good"], 0), (["good", "open"], 3), (["open", "bad"], 1), (["bad", "dead"], 4)], ids=str
)
def test_the_most_severe_outcome_gives_the_exit_code(
    names: list[str], code: int, call: Call, four: FakeSession
) -> None:
    answer = call("verify", *(f"scenarios/{name}.yaml" for name in names))
    assert answer.code == code


def test_select_and_exclude_match_names(call: Call, four: FakeSession) -> None:
    call("verify", "scenarios", "--select", "*d", "--exclude", "d*", "--select", "open")
    assert _ran(four) == ["bad", "good", "open"]


def test_nothing_selected_is_no_success(call: Call, four: FakeSession) -> None:
    answer = call("verify", "--select", "nothing*")
    assert answer.code == 2
    assert answer.err.startswith("error[E001]: no scenario is selected")
    assert "bad, dead, good, open" in answer.err
    Path("empty").mkdir()
    assert call("verify", "empty").code == 2


def test_folders_of_data_are_not_searched(call: Call, four: FakeSession) -> None:
    Path("scenarios/data").mkdir()
    Path("scenarios/data/balancer.yaml").write_text("num_slots: 8\n")
    call("verify", "--select", "good")
    assert _ran(four) == ["good"]
    assert call("verify", "scenarios/data/balancer.yaml").code == 2


def test_fail_fast_stops_at_the_first(call: Call, four: FakeSession) -> None:
    answer = call("verify", "--exclude", "dead", "--exclude", "bad", "scenarios/open.yaml", "scenarios", "--fail-fast")
    assert _ran(four) == ["open"]
    assert answer.code == 3
    assert "1 unknown, 1 not run" in answer.out


def test_a_path_named_twice_runs_once(call: Call, four: FakeSession) -> None:
    call("verify", "scenarios/good.yaml", "./scenarios/good.yaml", "scenarios", "--select", "good")
    assert _ran(four) == ["good"]


def test_text_says_why(call: Call, four: FakeSession) -> None:
    answer = call("verify")
    assert answer.out.rstrip().endswith("1 failed, 1 invalid, 1 unknown, 1 valid")
    assert "bad: invalid (scenarios/bad.yaml)\n  exactly_once is invalid: 3 missing; expected 0 missing" in answer.out
    assert "dead: failed (scenarios/dead.yaml)\n  error[E180]: rank 1 died\n    why: killed by signal 9" in answer.out
    assert "[1/4] bad: invalid (1.5 s)" in answer.err


def test_an_error_of_one_run_does_not_stop_the_others(call: Call, four: FakeSession) -> None:
    four.planned["bad"] = RunFailed("E182", "no room")
    answer = call("verify", "--exclude", "dead", "--format", "json")
    assert answer.code == 4
    results = {result["name"]: result for result in json.loads(answer.out)["results"]}
    assert results["bad"]["verdict"]["failure"] == "error[E182]: no room"
    assert results["open"]["exit_code"] == 3


def test_a_bad_scenario_stops_before_the_first_run(call: Call, four: FakeSession, write: Write) -> None:
    write("zz", "ranks: none\n")
    answer = call("verify")
    assert answer.code == 2
    assert "scenarios/zz.yaml" in answer.err
    assert _ran(four) == []


def test_run_folders_are_removed_unless_kept(call: Call, four: FakeSession) -> None:
    call("verify", "--select", "good")
    assert not four.ran[0][1].exists()
    answer = call("verify", "--select", "good", "--keep", "kept", "--format", "json")
    assert four.ran[1][1] == Path("kept/good")
    assert Path("kept/good/scenario.yaml").is_file()
    assert json.loads(answer.out)["results"][0]["folder"] == "kept/good"


def test_run_folders_are_removed_when_interrupted(call: Call, four: FakeSession) -> None:
    four.planned["bad"] = KeyboardInterrupt()
    assert call("verify").code == 130
    assert not four.ran[0][1].exists()


def test_run_folders_are_judged_without_running(call: Call, four: FakeSession) -> None:
    call("run", "scenarios/good.yaml", "--out", "runs/one")
    four.ran.clear()
    answer = call("verify", "runs", "--format", "json")
    assert four.ran == []
    (result,) = json.loads(answer.out)["results"]
    assert (result["name"], result["folder"]) == ("one", "runs/one")
    assert answer.code == result["exit_code"] != 0, "one placement row is no complete evidence"


def test_a_damaged_run_folder_is_bad_input(call: Call, four: FakeSession) -> None:
    call("run", "scenarios/good.yaml", "--out", "runs/one")
    Path("runs/one/scenario.yaml").unlink()
    answer = call("verify", "runs/one")
    assert answer.code == 2
    assert "scenario.yaml" in answer.out


def test_json_is_complete(call: Call, four: FakeSession) -> None:
    answer = call("verify", "--format", "json")
    whole = json.loads(answer.out)
    assert (whole["schema"], whole["exit_code"], whole["not_run"]) == (1, 4, 0)
    assert [(r["name"], r["exit_code"]) for r in whole["results"]] == [
        ("bad", 1),
        ("dead", 4),
        ("good", 0),
        ("open", 3),
    ]
    assert whole["results"][0]["verdict"]["checks"][1]["where"] == "layer 1, iteration 2"


def test_junit_is_read_by_another_program(call: Call, four: FakeSession) -> None:
    answer = call("verify", "--format", "junit", "-o", "verify.xml")
    assert (answer.code, answer.out) == (4, "")
    suites = {suite.name: suite for suite in junitparser.JUnitXml.fromfile("verify.xml")}
    counts = {name: (suite.tests, suite.failures, suite.errors) for name, suite in suites.items()}
    assert counts == {"good": (1, 0, 0), "open": (2, 0, 1), "bad": (2, 1, 0), "dead": (2, 0, 1)}
    cases = {case.name: case for case in suites["bad"]}
    (failure,) = cases["exactly_once"].result
    assert isinstance(failure, junitparser.Failure)
    assert failure.message == "3 missing; expected 0 missing"
    assert "layer 1, iteration 2" in failure.text
    assert cases["equality"].is_passed
    (error,) = next(case for case in suites["open"] if case.name == "stream_join").result
    assert (type(error), error.type) == (junitparser.Error, "unknown")


def test_junit_survives_what_xml_forbids(call: Call, write: Write, session: FakeSession) -> None:
    write("odd")
    session.planned["odd"] = verdict_of(CheckResult("leaks", Status.INVALID, "\x1b[31m<&>\x00", "none"))
    call("verify", "--format", "junit", "-o", "odd.xml")
    ((case,),) = junitparser.JUnitXml.fromfile("odd.xml")
    assert case.result[0].message == "?[31m<&>?; expected none"


def test_github_annotations(call: Call, four: FakeSession) -> None:
    lines = call("verify", "--format", "github").out.splitlines()
    assert lines == [
        "::error file=scenarios/bad.yaml,line=1,title=bad%3A exactly_once is invalid"
        "::3 missing; expected 0 missing%0Alayer 1, iteration 2%0Arank 1, token 7",
        "::error file=scenarios/dead.yaml,line=1,title=dead%3A the run failed"
        "::error[E180]: rank 1 died%0A  why: killed by signal 9",
        "::warning file=scenarios/open.yaml,line=1,title=open%3A stream_join is unknown::no trace; expected a trace",
        "::notice title=eplbctl verify::1 of 4 scenarios are valid",
    ]


def test_github_escapes_percent_signs_and_commas(call: Call, write: Write, session: FakeSession) -> None:
    write("odd")
    session.planned["odd"] = verdict_of(CheckResult("a,b", Status.INVALID, "50%\r\n", "100%"))
    line = call("verify", "--format", "github").out.splitlines()[0]
    assert line.endswith("title=odd%3A a%2Cb is invalid::50%25%0D%0A; expected 100%25")


def test_the_same_folder_name_twice_gets_a_number(call: Call, four: FakeSession) -> None:
    Path("more").mkdir()
    shutil.copy("scenarios/good.yaml", "more/good.yaml")
    call("verify", "scenarios/good.yaml", "more", "--keep", "kept")
    assert [folder.name for _, folder in four.ran] == ["good", "good-2"]
