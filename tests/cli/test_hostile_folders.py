"""A run folder that was damaged at any stage: one error or unknown, never a traceback and never valid."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import SMALL, Answer, Call, FakeSession, Write

GOOD = Path(__file__).parents[2] / "traces" / "good" / "two_ranks_gathered"
JUDGED = ("scenario.yaml", "meta.json", "evidence.rank0.jsonl", "evidence.rank1.jsonl", "trace.sqlite")
NOT_JUDGED = ("events.rank0.bin", "loads.npz", "verdict.json")
"""What the trace and the verdict were made from or of: a new judgement does not need it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a good run as the program writes it today."""
    copy = tmp_path / "run"
    shutil.copytree(GOOD, copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["scenario_sha256"] = hashlib.sha256((copy / "scenario.yaml").read_bytes()).hexdigest()
    (copy / "meta.json").write_text(json.dumps(meta))
    return copy


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _cut_line(path: Path) -> None:
    """A cut between two lines, which leaves whole ones."""
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\n", 0, len(data) - 1) + 1] if b"\n" in data[:-1] else b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 0xFF
    path.write_bytes(data)


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": _cut(0),
    "cut to a tenth": _cut(0.1),
    "cut to a half": _cut(0.5),
    "cut near its end": _cut(0.97),
    "without its last line": _cut_line,
    "a byte flipped": _flip,
    "deleted": Path.unlink,
    "junk": lambda path: path.write_bytes(b"\x00\xff junk " * 50),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "a dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
    "an endless device": _replaced(lambda path: path.symlink_to("/dev/zero")),
}


def assert_told(answer: Answer) -> None:
    """At most one error, and no word of a program's failure."""
    assert answer.code in (1, 2, 3, 4), answer
    assert "Traceback" not in answer.out + answer.err
    assert "internal error" not in answer.err
    assert (answer.out + answer.err).count("error[") <= 1, answer


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", JUDGED)
def test_a_damaged_run_is_never_valid(name: str, damage: str, folder: Path, call: Call, session: FakeSession) -> None:
    DAMAGES[damage](folder / name)
    judged = call("verify", folder)
    assert_told(judged)
    again = call("run", folder)
    assert_told(again)
    reported = call("report", folder)
    assert reported.code in (0, 2), reported
    assert "Traceback" not in reported.err
    assert len(reported.err.splitlines()) <= 3
    if judged.code == 2:
        assert (reported.code, again.code) == (2, 2)
        assert session.ran == []


@pytest.mark.parametrize("damage", ["empty", "cut to a half", "junk", "deleted", "a folder", "a pipe"])
@pytest.mark.parametrize("name", NOT_JUDGED)
def test_what_is_not_judged_changes_nothing(name: str, damage: str, folder: Path, call: Call) -> None:
    DAMAGES[damage](folder / name)
    assert call("verify", folder).code == 0
    assert call("report", folder).code == 0


def test_the_good_run_is_valid(folder: Path, call: Call) -> None:
    assert call("verify", folder).code == 0


def test_a_changed_scenario_is_not_the_one_that_was_run(folder: Path, call: Call) -> None:
    path = folder / "scenario.yaml"
    path.write_text(path.read_text().replace("equality: true", "equality: false"))
    answer = call("verify", folder)
    assert answer.code == 2
    assert "error[E059]" in answer.out


@pytest.mark.parametrize("command", [("run",), ("verify",), ("report",)], ids=" ".join)
@pytest.mark.parametrize("left", ["events.rank0.bin", "evidence.rank1.jsonl", "trace.sqlite", "verdict.json"])
def test_what_is_left_of_a_run_is_no_scenario(
    left: str, command: tuple[str, ...], call: Call, session: FakeSession
) -> None:
    Path("runs/one").mkdir(parents=True)
    Path("runs/one/scenario.yaml").write_text(SMALL)
    Path("runs/one", left).write_bytes(b"")
    answer = call(*command, "runs/one")
    assert answer.code == 2
    assert "error[E057]" in answer.out + answer.err
    assert "meta.json is missing" in answer.out + answer.err
    assert session.ran == []


def test_one_damaged_run_does_not_hide_the_others(folder: Path, call: Call, write: Write, session: FakeSession) -> None:
    (folder / "meta.json").unlink()
    write()
    answer = call("verify", folder, "scenarios")
    assert answer.code == 2
    assert "1 valid" in answer.out
    assert len(session.ran) == 1
