"""Files that commands write: checked before anything runs, and there whole or not at all."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eplbctl import output

from .conftest import Call, FakeSession, Write

ROOT = Path(__file__).parents[2]
NAME = os.fsdecode(b"\xff\xfe.json")


def _loop() -> str:
    Path("loop").symlink_to("loop")
    return "loop"


def _pipe() -> str:
    os.mkfifo("pipe")
    return "pipe"


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "nothing": (lambda: "", "E013"),
    "a folder": (lambda: "scenarios", "E002"),
    "the folder itself": (lambda: ".", "E002"),
    "a file that exists": (lambda: "scenarios/small.yaml", "E002"),
    "a missing folder": (lambda: "no/such", "E004"),
    "a path through a file": (lambda: "scenarios/small.yaml/x", "E004"),
    "a name that is too long": (lambda: "x" * 300, "E014"),
    "a path that is too long": (lambda: "x/" * 5000 + "x", "E014"),
    "a loop of links": (_loop, "E014"),
    "a pipe that nobody reads": (_pipe, "E014"),
    "a folder of the kernel": (lambda: "/proc/x", "E014"),
}
WRITERS = {
    "verify": ("verify", "scenarios", "-o"),
    "show": ("scenario", "show", "scenarios/small.yaml", "-o"),
    "init": ("scenario", "init"),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_written_is_told_first(
    what: str, writer: str, call: Call, write: Write, session: FakeSession
) -> None:
    write()
    make, code = REFUSED[what]
    answer = call(*WRITERS[writer], make())
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error[{code}]")
    assert answer.err.count("error[") == 1
    assert session.ran == []
    assert list(Path().rglob(".eplbctl-*")) == []


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder in which this process may not write, though it is the superuser's."""
    folder = Path("locked")
    folder.mkdir(mode=0o555)
    Path.cwd().chmod(0o755)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    yield folder
    if superuser:
        os.seteuid(0)
    folder.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify", "small.yaml", "-o", "locked/out"), "E014"),
        (("verify", "small.yaml", "--keep", "locked"), "E015"),
        (("run", "small.yaml", "--out", "locked"), "E015"),
        (("run", "small.yaml", "--out", "locked/a/b"), "E015"),
        (("run", "small.yaml", "--repeat", "2", "--out", "locked/a"), "E015"),
        (("scenario", "init", "locked/s.yaml"), "E014"),
    ],
)
def test_a_folder_that_is_locked(
    arguments: tuple[str, ...],
    code: str,
    call: Call,
    write: Write,
    session: FakeSession,
    request: pytest.FixtureRequest,
) -> None:
    write().rename("small.yaml")
    call("verify", "small.yaml", "-o", "warm")  # everything is imported that nobody else may read
    session.ran.clear()
    request.getfixturevalue("locked")
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error[{code}] ") or answer.err.startswith(f"error[{code}]: ")
    assert "Permission denied" in answer.err
    assert session.ran == []


@pytest.mark.parametrize(
    ("out", "code"),
    [("", "E013"), ("taken", "E002"), ("file", "E015"), ("file/x", "E015"), ("x" * 300, "E015"), ("link", "E015")],
)
def test_a_run_folder_that_cannot_be_one(out: str, code: str, call: Call, write: Write, session: FakeSession) -> None:
    Path("taken").mkdir()
    Path("taken/x").touch()
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    answer = call("run", write(), "--out", out)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"error[{code}]")
    assert session.ran == []


def test_an_older_file_stays_until_the_new_one_is_whole(
    call: Call, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("out.json")
    path.write_text("precious")

    def fails(descriptor: int) -> None:
        assert path.read_text() == "precious"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", fails)
    answer = call("scenario", "schema", "-o", path, "--force")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == "error[E183]: the output could not be written\n  why: No space left on device\n"
    assert path.read_text() == "precious"
    assert [p.name for p in Path().iterdir()] == ["out.json"]


def test_an_older_file_keeps_its_mode_and_its_link(call: Call) -> None:
    Path("real").write_text("old")
    Path("real").chmod(0o640)
    Path("link").symlink_to("real")
    assert call("scenario", "schema", "-o", "link", "--force").code == 0
    assert Path("link").is_symlink()
    assert Path("real").read_text().startswith("{")
    assert stat.S_IMODE(Path("real").stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_of_any_other(call: Call) -> None:
    Path("other").touch()
    assert call("scenario", "schema", "-o", "new").code == 0
    assert Path("new").stat().st_mode == Path("other").stat().st_mode


def test_a_name_that_is_no_text(call: Call) -> None:
    assert call("scenario", "schema", "-o", NAME).code == 0
    assert Path(NAME).read_text().startswith("{")
    answer = call("scenario", "schema", "-o", NAME)
    assert answer.code == 2
    assert "\\udcff\\udcfe.json exists already" in answer.err


def test_devices_and_pipes_are_written_as_they_are(call: Call) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert call("scenario", "init", "pipe").code == 0
        assert os.read(reader, 1 << 16).startswith(b"#")
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)
    assert call("scenario", "schema", "-o", "/dev/null").code == 0
    answer = call("scenario", "init", "/dev/full")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == "error[E183]: the output could not be written\n  why: No space left on device\n"


def test_stdout_as_a_file() -> None:
    command = [sys.executable, "-m", "eplbctl", "scenario", "schema", "-o", "/dev/stdout"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{")


def test_a_stream_that_cannot_show_a_character_shows_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    output.say("\u00e4 \u2028 \udcff")
    stream.seek(0)
    assert stream.read() == "\u00e4 \\u2028 \\udcff\n"
