"""Every way in which a command can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eplbctl.commands import shm
from moe_eplb.core.errors import BalancerError, RunFailed, ScenarioError

from .conftest import Call, FakeSession, Write

ROOT = Path(__file__).parents[2]
ERRORS = [
    (ScenarioError("E021", "it is bad", why="1 of 2", hint="mend it", where="x.yaml:1:2"), 2),
    (RunFailed("E180", "rank 1 died"), 4),
    (BalancerError("E131", "no slot"), 4),
]


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(shm.list_, "callback", fail)


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=["scenario", "failed", "balancer"])
def test_a_known_error_is_its_text_and_code(
    error: Exception, code: int, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raising(monkeypatch, error)
    answer = call("shm", "list")
    assert (answer.code, answer.out, answer.err) == (code, "", f"{error}\n")


def test_an_unknown_error_is_our_bug(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, ZeroDivisionError("by zero"))
    answer = call("shm", "list")
    assert answer.code == 70
    assert answer.err.startswith("internal error: ZeroDivisionError: by zero\n")
    assert "EPLBCTL_DEBUG=1" in answer.err
    assert "Traceback" not in answer.err


def test_the_traceback_is_there_for_those_who_ask(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, ZeroDivisionError("by zero"))
    monkeypatch.setenv("EPLBCTL_DEBUG", "1")
    answer = call("shm", "list")
    assert answer.code == 70
    assert "Traceback" in answer.err


def test_interruption(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, KeyboardInterrupt())
    answer = call("shm", "list")
    assert (answer.code, answer.err.strip()) == (130, "interrupted")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "x.yaml", "--repeat", "0"],
        ["verify", "--format", "pdf"],
        ["shm", "list", "--what"],
    ],
    ids=" ".join,
)
def test_bad_usage(arguments: list[str], call: Call) -> None:
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "Usage: eplbctl" in answer.err
    assert "Error: " in answer.err


def test_a_missing_file_is_no_bug(call: Call) -> None:
    answer = call("run", "nowhere.yaml")
    assert answer.code == 2
    assert answer.err.startswith("error[E003]: there is no nowhere.yaml")


def test_an_unwritable_place_is_no_bug(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, PermissionError(13, "Permission denied", "/locked/x"))
    answer = call("shm", "list")
    assert (answer.code, answer.err) == (2, "error[E006]: cannot use /locked/x\n  why: Permission denied\n")


@pytest.fixture
def _process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program sets handlers for the process that it has for itself: here other tests follow."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_process_as_before")
def test_python_m_eplbctl_is_the_same_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    monkeypatch.setattr("sys.argv", ["eplbctl", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("eplbctl", run_name="__main__")
    assert ended.value.code == 0
    assert "Usage: eplbctl" in capsys.readouterr().out


def test_outputs_are_never_overwritten_unless_told(call: Call, write: Write, session: FakeSession) -> None:
    Path("taken.json").write_text("precious")
    arguments = ("verify", write(), "--format", "json", "-o", "taken.json")
    answer = call(*arguments)
    assert answer.code == 2
    assert answer.err.startswith("error[E002]: taken.json exists already")
    assert Path("taken.json").read_text() == "precious"
    assert session.ran == []
    assert call(*arguments, "--force").code == 0
    assert Path("taken.json").read_text().startswith("{")


def test_an_output_needs_its_folder(call: Call, write: Write, session: FakeSession) -> None:
    answer = call("verify", write(), "-o", "no/such/file")
    assert answer.code == 2
    assert answer.err.startswith("error[E004]: there is no folder no/such")
    assert session.ran == []


def test_a_full_disk_is_a_failure_and_no_bug(call: Call) -> None:
    answer = call("scenario", "schema", "-o", "/dev/full", "--force")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == "error[E183]: the output could not be written\n  why: No space left on device\n"


@pytest.mark.parametrize(
    "command", ["scenario schema", "scenario check scenarios/quickstart.yaml", "shm list", "completion bash"]
)
def test_a_reader_that_has_gone_changes_no_verdict(command: str) -> None:
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "eplbctl", *command.split()], cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_help_page_nobody_reads_is_no_verdict(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, SystemExit(1))
    assert call("shm", "list").code == 3
