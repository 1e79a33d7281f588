"""The recorder ``nsys`` with a stand-in for Nsight Systems: found, refused, failing, late, interrupted."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from moe_eplb.core.errors import RunFailed, TraceError, UsageError
from moe_eplb.recording import children, nsys, nsys_tool, profilers
from moe_eplb.recording.nsys_tool import Nsys
from tests.support.as_a_terminal import restore_defaults

FAKE = Path(__file__).with_name("fake_nsys.py")
SECRET = b"a-secret-of-the-environment"
ROOT = Path(__file__).parents[2]

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put the stand-in somewhere, as an executable; PATH holds nothing else of that name."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def put(place: str = "bin/nsys", wrong: str = "") -> Path:
        path = tmp_path / "vendor" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nFAKE_NSYS='{wrong}' exec {sys.executable} {FAKE} \"$@\"\n")
        path.chmod(0o755)
        return path

    return put


def _program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def _run(folder: Path, verdict: bool = True, code: int = 0) -> list[str]:
    """A program that makes a run folder, as ``eplbctl run`` does, and ends."""
    made = f"f = pathlib.Path({str(folder)!r}); f.mkdir(); (f / 'verdict.json').touch()" if verdict else "pass"
    return _program(
        f"import os, pathlib, sys; print('it ran', {profilers.WRAPPED!r} in os.environ); {made}; sys.exit({code})"
    )


# -- finding ---------------------------------------------------------------------------------------------------------


def test_one_on_path_comes_first(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = install("bin/nsys"), install("nsight-systems/2025.3.1/bin/nsys")
    monkeypatch.setenv("PATH", f"{first.parent}:/usr/bin:/bin")
    assert nsys_tool.look(tmp_path / "vendor") == [Nsys(first, "2025.3.1.90"), Nsys(second, "2025.3.1.90")]
    assert nsys_tool.find(tmp_path / "vendor").path == first


def test_newest_of_its_own_folders_before_those_of_nsight_compute(install: Install, tmp_path: Path) -> None:
    expected = [
        install(place)
        for place in (
            "nsight-systems/2025.10.1/bin/nsys", "nsight-systems/2025.9.1/bin/nsys",
            "nsight-systems-cli/2024.1.1/bin/nsys", "nsight-systems/2023.1/target-linux-x64/nsys",
            "nsight-compute/2025.3.1/host/target-linux-x64/nsys", "nsight-compute/2024.3/host/target-linux-x64/nsys",
        )
    ]  # fmt: skip
    found = [tool.path for tool in nsys_tool.look(tmp_path / "vendor")]
    assert sorted(found) == sorted(expected)
    own = [path for path in found if "nsight-systems/" in str(path) and "bin" in path.parts]
    assert own == expected[:2]
    assert found[-2:] == expected[-2:]


def test_two_names_of_one_file_are_one(install: Install, tmp_path: Path) -> None:
    real = install("nsight-systems/2025.3.1/target-linux-x64/nsys")
    link = tmp_path / "vendor" / "nsight-systems" / "2025.3.1" / "bin" / "nsys"
    link.parent.mkdir()
    link.symlink_to(real)
    assert len(nsys_tool.look(tmp_path / "vendor")) == 1


def test_none_is_one_clear_error(install: Install, tmp_path: Path) -> None:
    assert nsys_tool.look(tmp_path / "vendor") == []
    with pytest.raises(UsageError) as caught:
        nsys_tool.find(tmp_path / "vendor")
    assert (caught.value.code, int(caught.value.exit_code)) == ("E009", 2)
    assert "PATH" in caught.value.why


def test_a_missing_library_is_named_with_its_fix(install: Install, tmp_path: Path) -> None:
    install("nsight-compute/2025.3.1/host/target-linux-x64/nsys", "no library")
    with pytest.raises(UsageError) as caught:
        nsys_tool.find(tmp_path / "vendor")
    assert caught.value.code == "E009"
    assert "the library libdw.so.1 is missing" in caught.value.why
    assert "LD_LIBRARY_PATH" in caught.value.hint


def test_one_that_does_not_run_is_passed_over(install: Install, tmp_path: Path) -> None:
    install("nsight-systems/2025.3.1/bin/nsys", "no library")
    works = install("nsight-compute/2025.3.1/host/target-linux-x64/nsys")
    assert nsys_tool.find(tmp_path / "vendor").path == works


def test_one_that_hangs_is_not_waited_for(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsys_tool, "_VERSION_S", 0.3)
    install("nsight-systems/2025.3.1/bin/nsys", "hangs at its version")
    with pytest.raises(UsageError, match=r"did not tell its version within 0\.3 s"):
        nsys_tool.find(tmp_path / "vendor")


def test_one_for_another_machine_is_a_problem_and_no_crash(install: Install, tmp_path: Path) -> None:
    path = install("nsight-systems/2025.3.1/bin/nsys")
    path.write_bytes(b"\x7fELF of another machine")
    assert nsys_tool.look(tmp_path / "vendor")[0].problem == "Exec format error"


# -- recording -------------------------------------------------------------------------------------------------------


def _tool(install: Install, wrong: str = "") -> Nsys:
    return Nsys(install("bin/nsys", wrong), "2025.3.1")


def _no_trace_of_the_report(folder: Path) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file() and "vendor" not in path.parts]
    return not any(SECRET in path.read_bytes() for path in files)


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_a_run_leaves_a_redacted_export_and_its_exit_code(
    code: int, install: Install, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "run"
    (tmp_path / "new").mkdir()
    assert nsys.record(_tool(install), _run(folder, code=code), folder, timeout_s=60) == code
    with closing(sqlite3.connect(folder / nsys.EXPORT)) as connection:
        rows = connection.execute("SELECT * FROM META_DATA_CAPTURE").fetchall()
    assert rows == [("PROCESS_0:ENVIRONMENT", "(removed)"), ("RATE_HZ", "0")]
    assert sorted(path.name for path in folder.iterdir()) == ["nsys.sqlite", "verdict.json"]
    assert list(folder.parent.iterdir()) == [folder]
    assert _no_trace_of_the_report(tmp_path)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Collecting data...\nit ran True\n" in captured.err


def test_the_raw_report_is_kept_for_its_owner_alone_when_asked_for(install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    nsys.record(_tool(install), _run(folder), folder, timeout_s=60, keep_report=True)
    assert SECRET in (folder / nsys.REPORT).read_bytes()
    assert (folder / nsys.REPORT).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("code", [2, 4, 70, 130])
def test_a_run_without_a_verdict_has_told_why_itself(code: int, install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert nsys.record(_tool(install), _run(folder, verdict=False, code=code), folder, timeout_s=60) == code
    assert not folder.exists()
    assert _no_trace_of_the_report(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "what", "why"),
    [
        ("fails", "ended with code 1 before the run had a verdict", "unrecognised option '--cpuctxsw'"),
        ("no report", "left no report", "libelf.so.1"),
        ("export fails", "export ended with code 3", "cannot read the report"),
    ],
)
def test_what_nsys_says_is_in_the_error(wrong: str, what: str, why: str, install: Install, tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        nsys.record(_tool(install, wrong), _run(tmp_path / "run"), tmp_path / "run", timeout_s=60)
    assert caught.value.code == "E185"
    assert what in caught.value.what
    assert why in caught.value.why
    assert ("LD_LIBRARY_PATH" in caught.value.hint) == ("libelf" in why)
    assert _no_trace_of_the_report(tmp_path)


def test_an_export_that_cannot_be_redacted_does_not_stay(install: Install, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E068"):
        nsys.record(_tool(install, "export is damaged"), _run(tmp_path / "run"), tmp_path / "run", timeout_s=60)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["verdict.json"]
    assert _no_trace_of_the_report(tmp_path)


def test_an_export_has_a_bound(install: Install, tmp_path: Path) -> None:
    report = tmp_path / nsys.REPORT
    report.write_bytes(SECRET)
    started = time.monotonic()
    with pytest.raises(RunFailed, match=r"did not export its report within 0\.5 s"):
        nsys.export_report(_tool(install, "export hangs"), report, tmp_path / nsys.EXPORT, timeout_s=0.5)
    assert time.monotonic() - started < 20


DAEMON = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.setsid(); time.sleep(60)"
"""It leaves the group of what has started it, and does not end when told to."""
START_DAEMON = f"import pathlib, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {DAEMON!r}]);"


def test_out_of_time_everything_that_was_started_is_ended(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_GRACE_S", 0.5)
    pid = tmp_path / "pid"
    stray = f"{START_DAEMON} pathlib.Path({str(pid)!r}).write_text(str(p.pid)); time.sleep(60)"
    with pytest.raises(RunFailed, match="did not end within 3 s") as caught:
        nsys.record(_tool(install), _program(stray), tmp_path / "run", timeout_s=3)
    assert "Collecting data" in caught.value.why
    assert _gone(int(pid.read_text()))
    assert _no_trace_of_the_report(tmp_path)


def _gone(pid: int) -> bool:
    """Whether a process has ended within a second; one that nobody has waited for yet has."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_what_a_program_leaves_running_is_ended_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_GRACE_S", 0.5)
    pid = tmp_path / "pid"
    text = f"{START_DAEMON} time.sleep(1); pathlib.Path({str(pid)!r}).write_text(str(p.pid))"
    started = time.monotonic()
    assert children.run_bounded(_program(text), mark="A_MARK_OF_THIS_TEST", timeout_s=60).code == 0
    assert time.monotonic() - started < 20
    assert _gone(int(pid.read_text()))


def test_a_signal_ends_the_run_and_leaves_nothing(install: Install, tmp_path: Path) -> None:
    """The recording program is a process of its own here: the signal goes to it alone, as from ``kill``."""
    pid = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    outer = f"""
import sys
from pathlib import Path
from eplbctl import signals
from moe_eplb.recording import nsys
from moe_eplb.recording.nsys_tool import Nsys
signals.listen()
try:
    tool, folder = Nsys(Path({str(_tool(install).path)!r})), Path({str(tmp_path / "run")!r})
    nsys.record(tool, [sys.executable, "-c", {inner!r}], folder, timeout_s=60)
except signals.Terminated as ended:
    sys.exit(ended.exit_code)
"""
    process = subprocess.Popen(_program(outer), cwd=ROOT, stderr=subprocess.DEVNULL, preexec_fn=restore_defaults)
    try:
        for _ in range(500):
            if pid.exists() and pid.read_text():
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
    assert _gone(int(pid.read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pid", "vendor"]


def test_a_program_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="could not be started"):
        nsys.record(Nsys(tmp_path / "nothing"), ["true"], tmp_path / "run", timeout_s=5)
    assert list(tmp_path.iterdir()) == []


# -- one profiler a process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (profilers.WRAPPED, "x"), ("NSYS_PROFILING_SESSION_ID", "5"), ("CUDA_INJECTION64_PATH", "/a/b.so"),
        ("LD_PRELOAD", "/opt/x/libToolsInjectionProxy64.so"),
    ],
)  # fmt: skip
def test_a_second_profiler_is_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (profilers.WRAPPED, "NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    profilers.require_no_profiler("torch")
    if variable != "LD_PRELOAD":
        monkeypatch.setenv(variable, value)
    else:
        monkeypatch.setattr(os, "environ", {**os.environ, variable: value})
    with pytest.raises(UsageError) as caught:
        profilers.require_no_profiler("torch")
    assert caught.value.code == "E019"
    assert variable in caught.value.why


def test_a_run_that_nsys_shall_record_does_not_start_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(profilers.WRAPPED, raising=False)
    profilers.require_wrapped("torch")
    with pytest.raises(UsageError, match="E019"):
        profilers.require_wrapped("nsys")
    monkeypatch.setenv(profilers.WRAPPED, "x")
    profilers.require_wrapped("nsys")
