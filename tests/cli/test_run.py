"""``eplbctl run``: what it runs, where, what it shows, and what it ends with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_eplb.core.errors import ExitCode
from moe_eplb.core.scenario import Scenario
from moe_eplb.session import RunResult

from .conftest import INVALID, UNKNOWN, VALID, Call, FakeSession, Write, verdict_of


def test_a_run_shows_checks_folder_and_next_commands(call: Call, write: Write, session: FakeSession) -> None:
    answer = call("run", write())
    assert answer.code == 0
    folder = session.ran[0][1]
    assert re.fullmatch(r"runs/small-\d{8}T\d{6}Z", str(folder))
    assert answer.out.startswith(
        "small: valid in 1.5 s (2 ranks, 2 layers, 4 experts in 6 slots, 4 iterations, seed 0)\n"
    )
    assert re.search(r"^equality +valid +ratio 0.1 +ratio <= 1$", answer.out, re.MULTILINE)
    assert f"run folder: {folder}" in answer.out
    for command in ("report", "verify", "run"):
        assert f"  eplbctl {command} {folder} " in answer.err


def test_progress_is_plain_lines_without_a_terminal(call: Call, write: Write, session: FakeSession) -> None:
    err = call("run", write()).err
    assert [line for line in err.splitlines() if "iteration" in line] == [
        f"small: iteration {done} of 4" for done in (1, 2, 3, 4)
    ]


def test_progress_is_a_bar_on_a_terminal(
    call: Call, write: Write, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    err = call("run", write()).err
    assert "iteration 1" not in err


def test_values_are_changed_in_the_scenario(call: Call, write: Write, session: FakeSession) -> None:
    arguments = ("--set", "model.top_k=1", "--ranks", 4, "--seed", 9, "--device", "cpu", "--recorder", "builtin")
    assert call("run", write(), *arguments).code == 0
    scenario = session.ran[0][0]
    assert (scenario.model.top_k, scenario.ranks, scenario.seed) == (1, 4, 9)


def test_a_bad_value_is_told_before_anything_runs(call: Call, write: Write, session: FakeSession) -> None:
    answer = call("run", write(), "--set", "model.top_k=5")
    assert answer.code == 2
    assert "top_k 5" in answer.err
    assert session.ran == []


def test_all_bad_files_are_told_at_once(call: Call, write: Write, session: FakeSession) -> None:
    paths = [write(name, "ranks: 0\nmodel: {layers: 1, experts: 1, top_k: 1}\n") for name in ("a", "b")]
    answer = call("run", *paths)
    assert answer.code == 2
    assert all(f"{path}:1:" in answer.err for path in paths)
    assert session.ran == []


def test_repeats_get_folders_of_their_own(call: Call, write: Write, session: FakeSession) -> None:
    assert call("run", write(), "--repeat", 3, "--out", "here").code == 0
    folders = [folder for _, folder in session.ran]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path("here")}


def test_out_is_the_folder_of_a_single_run_and_must_be_free(call: Call, write: Write, session: FakeSession) -> None:
    assert call("run", write(), "--out", "here").code == 0
    assert session.ran[0][1] == Path("here")
    again = call("run", write(), "--out", "here")
    assert again.code == 2
    assert again.err.startswith("error[E002]: here exists already")
    assert len(session.ran) == 1


@pytest.mark.parametrize(
    ("checks", "failure", "code"),
    [((VALID, UNKNOWN), "", 3), ((VALID, UNKNOWN, INVALID), "", 1), ((VALID,), "error[E180]: rank 1 died", 4)],
)
def test_the_exit_code_is_the_verdict(
    checks: tuple[object, ...], failure: str, code: int, call: Call, write: Write, session: FakeSession
) -> None:
    session.planned["small"] = verdict_of(*checks, failure=failure)  # type: ignore[arg-type]
    answer = call("run", write())
    assert answer.code == code
    assert failure in answer.out


def test_the_worst_of_several_is_the_exit_code(call: Call, write: Write, session: FakeSession) -> None:
    session.planned = {"b": verdict_of(INVALID), "c": verdict_of(UNKNOWN)}
    answer = call("run", write("a"), write("b"), write("c"))
    assert answer.code == 1
    assert "at layer 1, iteration 2" in answer.out


def test_an_invalid_check_is_explained(call: Call, write: Write, session: FakeSession) -> None:
    session.planned["small"] = verdict_of(INVALID)
    out = call("run", write()).out
    assert (
        "  exactly_once is invalid: 3 missing; expected 0 missing\n    at layer 1, iteration 2\n    rank 1, token 7"
        in out
    )


def test_the_command_line_is_kept(call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--seed", 3)
    assert session.argv == [("eplbctl", "run", "scenarios/small.yaml", "--seed", "3")]


def test_a_run_folder_is_reproduced(call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--seed", 3, "--out", "first")
    answer = call("run", "first")
    assert answer.code == 0
    assert session.ran[1][0] == session.ran[0][0]
    assert "reproduced: all 1 placements (layers x iterations) are those of first" in answer.out


def test_another_placement_is_no_reproduction(call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--out", "first")
    session.digest = 6
    answer = call("run", "first")
    assert answer.code == 1
    assert "NOT reproduced: the placements differ from those of first from layer 0, iteration 0 on" in answer.out


def test_a_run_folder_is_run_as_it_was(call: Call, write: Write, session: FakeSession) -> None:
    call("run", write(), "--out", "first")
    answer = call("run", "first", "--seed", 4)
    assert answer.code == 2
    assert "eplbctl run first/scenario.yaml --set seed=4" in answer.err
    assert len(session.ran) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_under_torchrun_only_rank_0_prints(
    rank: int, call: Call, write: Write, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_joined(scenario: Scenario, folder: Path, **options: object) -> RunResult | ExitCode:
        return session.run(scenario, folder) if rank == 0 else ExitCode.INVALID

    session.planned["small"] = verdict_of(INVALID)
    monkeypatch.setattr("moe_eplb.session.run_joined", run_joined)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", str(rank))
    answer = call("run", write())
    assert answer.code == 1
    assert bool(answer.out) is (rank == 0)
    assert bool(answer.err) is (rank == 0)
