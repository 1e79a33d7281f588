"""``eplbctl run --recorder``: asked for in scenario or option, refused before anything runs, shown once."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from eplbctl.signals import Terminated
from moe_eplb.core.errors import ExitCode
from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.recording import nsys, nsys_tool, profilers
from moe_eplb.recording.nsys_tool import Nsys

from .conftest import INVALID, SMALL, VALID, Call, FakeSession, Write, verdict_of

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests" / "recording" / "fake_nsys.py"
TOOL = Nsys(Path("/opt/nsys"), "2025.3.1")


@pytest.fixture(autouse=True)
def without_profilers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (profilers.WRAPPED, "NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH"):
        monkeypatch.delenv(name, raising=False)


class _Nsys:
    """Takes the place of recording: leaves a run folder and remembers what it was asked for."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[list[str], dict[str, Any]]] = []

    def record(self, tool: Nsys, command: Sequence[str], folder: Path, **options: Any) -> int:
        assert tool == TOOL
        self.calls.append((list(command), options))
        if self.code in (0, 1):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scenario.yaml").write_text(SMALL)
            (folder / "meta.json").write_text(json.dumps({"seed": 0}))
            writer = EvidenceWriter(folder / "evidence.rank0.jsonl", 0)
            writer.write(Row.PLACEMENT, 0, 0, digest=5, slots=[0, 1, 2, 3, 0, 1])
            writer.close()
            verdict = verdict_of(INVALID if self.code else VALID)
            (folder / "verdict.json").write_text(json.dumps(verdict.to_json()))
        return self.code


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> _Nsys:
    fake = _Nsys()
    monkeypatch.setattr(nsys_tool, "find", lambda: TOOL)
    monkeypatch.setattr(nsys, "record", fake.record)
    return fake


def test_the_option_is_a_change_of_the_scenario(call: Call, write: Write, session: FakeSession) -> None:
    assert call("run", write(), "--recorder", "torch", "--set", "record.profile_iterations=2").code == 0
    record = session.ran[0][0].record
    assert (record.recorder, record.profile_iterations) == ("torch", 2)


def test_a_recorder_that_does_not_exist_is_refused(call: Call, write: Write, session: FakeSession) -> None:
    assert call("run", write(), "--recorder", "perf").code == 2
    assert call("run", write(), "--set", "record.recorder=perf").code == 2
    assert session.ran == []


@pytest.mark.parametrize("option", [("--recorder", "nsys"), ("--set", "record.recorder=nsys")])
def test_without_nsys_nothing_runs(
    option: tuple[str, str], call: Call, write: Write, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nsys_tool, "_candidates", lambda vendor: [])
    answer = call("run", write(), *option)
    assert answer.code == 2
    assert answer.err.startswith("error[E009]: the recorder 'nsys' needs Nsight Systems, and there is none")
    assert "hint: install Nsight Systems" in answer.err
    assert session.ran == []
    assert not Path("runs").exists()


def test_nsys_wraps_this_program_with_the_same_changes(
    call: Call, write: Write, session: FakeSession, recording: _Nsys
) -> None:
    path = write()
    answer = call("run", path, "--recorder", "nsys", "--seed", 7, "--out", "here", "--set", "record.keep_report=true")
    assert answer.code == 0
    assert session.ran == []
    ((command, options),) = recording.calls
    changes = ["--set", "record.keep_report=true", "--set", "seed=7", "--set", "record.recorder=nsys"]
    assert command == [sys.executable, "-m", "eplbctl", "run", *changes, "--out", "here", "--", str(path)]
    assert options["keep_report"] is True
    assert options["timeout_s"] > 60
    assert answer.out.count("run folder: here") == 1


def test_every_run_is_wrapped_apart_and_the_worst_counts(
    call: Call, write: Write, session: FakeSession, recording: _Nsys
) -> None:
    recording.code = 1
    assert call("run", write("a"), write("b"), "--recorder", "nsys", "--repeat", 2).code == 1
    folders = [command[command.index("--out") + 1] for command, _ in recording.calls]
    assert len(set(folders)) == 4


@pytest.mark.parametrize("code", [2, 4, 70, 130])
def test_a_run_that_has_no_verdict_ends_with_its_own_code(
    code: int, call: Call, write: Write, recording: _Nsys
) -> None:
    recording.code = code
    answer = call("run", write(), "--recorder", "nsys")
    assert answer.code == code
    assert (answer.out, "internal error" in answer.err) == ("", False)


def test_a_run_that_was_told_to_end_ends_this_program_too(call: Call, write: Write, recording: _Nsys) -> None:
    recording.code = 143
    with pytest.raises(Terminated) as ended:
        call("run", write(), "--recorder", "nsys", "--repeat", 3)
    assert ended.value.exit_code == 143
    assert len(recording.calls) == 1


def test_the_wrapped_program_runs_and_leaves_showing_to_the_other(
    call: Call, write: Write, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(profilers.WRAPPED, "x")
    session.planned["small"] = verdict_of(INVALID)
    answer = call("run", write(), "--recorder", "nsys")
    assert (answer.code, answer.out) == (int(ExitCode.INVALID), "")
    assert len(session.ran) == 1


@pytest.mark.parametrize("recorder", ["torch", "nsys"])
def test_a_second_profiler_is_refused_before_anything_runs(
    recorder: str, call: Call, write: Write, session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "17")
    answer = call("run", write(), "--recorder", recorder)
    assert answer.code == 2
    assert "error[E019]" in answer.err
    assert "NSYS_PROFILING_SESSION_ID" in answer.err
    assert call("run", write(), "--recorder", "builtin").code == 0
    assert len(session.ran) == 1


def test_ranks_of_torchrun_are_not_wrapped(
    call: Call, write: Write, recording: _Nsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    answer = call("run", write(), "--recorder", "nsys")
    assert answer.code == 2
    assert "torchrun has started this one" in answer.err
    assert recording.calls == []


def test_verify_does_not_leave_a_recorder_out_silently(call: Call, write: Write) -> None:
    answer = call("verify", write("a", SMALL + "record: {recorder: nsys}\n"))
    assert answer.code != 0
    assert "E019" in answer.out + answer.err


def test_a_whole_run_under_a_stand_in_for_nsys(tmp_path: Path, write: Write) -> None:
    tool = tmp_path / "bin" / "nsys"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    path = write()
    answer = subprocess.run(
        [sys.executable, "-m", "eplbctl", "run", path, "--recorder", "nsys", "--out", "here"],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("small: valid in ")
    assert "Collecting data" in answer.stderr
    assert "small: valid" not in answer.stderr
    with closing(sqlite3.connect("here/nsys.sqlite")) as connection:
        assert connection.execute("SELECT value FROM META_DATA_CAPTURE").fetchall() == [("(removed)",), ("0",)]
    assert json.loads(Path("here/meta.json").read_text())["recorder"] == "nsys"
    assert Path("here/trace.sqlite").exists()
    assert not [name for name in Path().iterdir() if name.name.startswith(".here")]
