"""Captures of real runs on GPUs: judged as far as they show it, equal to the run's own rows, small, and redacted."""

from __future__ import annotations

import lzma
import re
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from eplbctl.cli import invoke
from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.order_check import OrderReport, check_order
from moe_eplb.analysis.ranges import Launches, RangeIndex
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import prepare
from moe_eplb.core.events import HOST, KINDS, UPDATER, Kind, Role
from moe_eplb.core.verdict import Status
from moe_eplb.recording.nvtx_ranges import DOMAIN
from moe_eplb.recording.redact import redact

FOLDER = Path(__file__).parents[2] / "traces" / "recorded"
EXPORT, ROWS = ".nsys.sqlite.xz", ".trace.sqlite.xz"
EXPORTS = sorted(FOLDER.glob(f"*{EXPORT}"))
LARGEST = 300_000
NOT_SHOWN = {"eager": set[str](), "graph": {"graph_order"}}
"""What an export cannot show of a run, by the first word of the capture's name: it has no edges of graphs."""
_THREAD = (1 << 24) - 1
_FORBIDDEN = re.compile(
    rb"/(?:home|root|Users|tmp|work|mnt|opt|usr/local|var)/\w|[A-Z][A-Z_]{3,}=(?!CREATE TABLE )[^(]|"
    rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|\b\d{1,3}(?:\.\d{1,3}){3}\b(?!\.\d)"
)


class Range(NamedTuple):
    """A range or a mark, as either side has it.

    `parent` is the place of the innermost range around it in its thread, UNKNOWN if there is none, None if its times
    are those of the device, which tell nothing of where the host put it on its stream.
    """

    name: str
    iteration: int
    mark: bool
    parent: int | None


@cache
def _capture(path: Path) -> Capture:
    return prepare(read_capture(path))


@cache
def _report(path: Path) -> OrderReport:
    return check_order(_capture(path))


def _unpacked(path: Path, folder: Path) -> Path:
    target = folder / path.stem
    with lzma.open(path) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target


def _query(path: Path, folder: Path, query: str) -> list[tuple[int, ...]]:
    with closing(sqlite3.connect(_unpacked(path, folder))) as connection:
        return connection.execute(query).fetchall()


def _gpus(path: Path) -> int:
    return int(path.name.removesuffix(EXPORT).rpartition("_")[2].removesuffix("gpu"))


def test_there_are_captures_and_each_has_its_rows() -> None:
    assert {path.name.partition("_")[0] for path in EXPORTS} <= set(NOT_SHOWN)
    wanted = {f"{mode}_{overlap}_{gpus}gpu" for mode in NOT_SHOWN for overlap in ("serial", "after") for gpus in (1, 2)}
    assert wanted <= {path.name.removesuffix(EXPORT) for path in EXPORTS}
    beside = {path.name.replace(EXPORT, ROWS) for path in EXPORTS}
    assert {path.name for path in FOLDER.iterdir()} == {path.name for path in EXPORTS} | beside


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_every_check_is_valid_that_an_export_can_show(path: Path) -> None:
    report = _report(path)
    unknown = {check.name: check.detail for check in report.checks if check.status is Status.UNKNOWN}
    assert set(unknown) == NOT_SHOWN[path.name.partition("_")[0]]
    assert all(unknown.values())
    assert report.illegal == ()
    assert all(check.status is not Status.INVALID for check in report.checks)
    assert sum(report.calls.values()) > 0
    votes = 2 * 4 * _gpus(path)  # layers, iterations
    assert report.check("waits_not_work").observed.startswith(f"{votes} of ")


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_experts_move_and_every_iteration_is_seen(path: Path, tmp_path: Path) -> None:
    rows = path.with_name(path.name.replace(EXPORT, ROWS))
    commits = _query(rows, tmp_path, f"SELECT iteration, a FROM EPLB_RECORD WHERE kind = {int(Kind.COMMIT)} AND a > 0")
    assert commits
    gpu = _capture(path).gpu
    moved = gpu["role"] == c.ROLE_CODE[Role.EPLB_MIGRATE]
    assert moved.any()
    assert set(np.unique(gpu["iteration"][gpu["iteration"] >= 0]).tolist()) >= {0, 1, 2, 3}
    all_reduces = [n for n, name in enumerate(_capture(path).names) if name.startswith("ncclDevKernel_AllReduce")]
    roles = gpu["role"][np.isin(gpu["name"], all_reduces)].tolist()
    expected = 0 if _gpus(path) == 1 else 2 * 4 * _gpus(path)  # one for each layer and iteration of a rank
    assert roles == [c.ROLE_CODE[Role.EPLB_ALLREDUCE]] * expected


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_what_moves_experts_was_launched_by_a_thread_that_moves_them(path: Path) -> None:
    capture = _capture(path)
    names = [KINDS[kind].name for kind, info in KINDS.items() if info.role is Role.EPLB_MIGRATE]
    texts = [number for number, name in enumerate(capture.names) if name.partition("/")[0] in names]
    moves = capture.ranges[np.isin(capture.ranges["text"], texts)]
    gpu, call = capture.gpu, Launches(capture).call
    rows = np.flatnonzero((gpu["role"] == c.ROLE_CODE[Role.EPLB_MIGRATE]) & (call >= 0))
    made = capture.calls[call[rows]]
    assert (RangeIndex(moves).around(made["process"], made["start"], made["thread"]) >= 0).all()


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_ranges_of_the_export_equal_the_rows_of_the_run_in_count_name_and_nesting(path: Path, tmp_path: Path) -> None:
    exported, recorded = _exported(_capture(path)), _recorded(path.with_name(path.name.replace(EXPORT, ROWS)), tmp_path)
    assert len(exported) == len(recorded) >= 2, "the model's thread and the updater's"
    for of_export, of_run in zip(exported, recorded, strict=True):
        assert len(of_export) == len(of_run)
        assert [row[:3] for row in of_export] == [row[:3] for row in of_run]
        on_host = [place for place, row in enumerate(of_run) if row.parent is not None]
        assert [of_export[place].parent for place in on_host] == [of_run[place].parent for place in on_host]
        submitted = [row.parent for row, known in zip(of_export, of_run, strict=True) if known.parent is None]
        assert c.UNKNOWN not in submitted, "work is put on a stream within a step"
    nested = {of_run[row.parent].name for of_run in recorded for row in of_run if row.parent not in (None, c.UNKNOWN)}
    assert "step" in nested


def _exported(capture: Capture) -> list[list[Range]]:
    """The ranges of our domain, by thread in order of time."""
    mine = capture.ranges[capture.ranges["domain"] == capture.names.index(DOMAIN)]
    mine = mine[np.lexsort((-mine["end"], mine["start"]))]
    found = []
    for thread in _in_order(mine["thread"].tolist()):
        rows = mine[mine["thread"] == thread]
        parents = _parents(rows["start"].tolist(), rows["end"].tolist(), [True] * len(rows))
        names = [capture.names[text] for text in rows["text"].tolist()]
        marks = (rows["kind"] == c.MARK).tolist()
        found.append(list(map(Range, names, rows["payload"].tolist(), marks, parents)))
    return found


def _recorded(path: Path, folder: Path) -> list[list[Range]]:
    """What the run's own log has of its host, by thread in the order in which it was opened.

    Work that the device did on its own in a replay is no range of the host.
    """
    query = "SELECT thread, name, layer, iteration, start, end, stream, kind FROM EPLB_RECORD ORDER BY seq"
    rows = _query(path, folder, query)
    replayed = {row[3] for row in rows if row[7] == Kind.REPLAY}
    on_device = [row[6] not in (HOST, UPDATER) and KINDS[Kind(row[7])].role is not Role.OTHER for row in rows]
    kept = [(row, there) for row, there in zip(rows, on_device, strict=True) if not (there and row[3] in replayed)]
    found = []
    for thread in _in_order([row[0] for row, _ in kept]):
        mine = [(row, there) for row, there in kept if row[0] == thread]
        parents = _parents([row[4] for row, _ in mine], [row[5] for row, _ in mine], [not there for _, there in mine])
        names = [f"{row[1]}/{row[2]}" if row[2] >= 0 else str(row[1]) for row, _ in mine]
        told = [None if there else parent for (_, there), parent in zip(mine, parents, strict=True)]
        marks = [row[4] == row[5] and not there for row, there in mine]
        found.append([Range(*one) for one in zip(names, [row[3] for row, _ in mine], marks, told, strict=True)])
    return found


def _in_order(threads: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(threads))


def _parents(starts: Sequence[int], ends: Sequence[int], on_host: Sequence[bool]) -> list[int]:
    """Place of the innermost range of the host's time around each row, or UNKNOWN."""
    parents, around = list[int](), list[int]()
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        while on_host[place] and around and ends[around[-1]] <= start:
            around.pop()
        parents.append(around[-1] if around else c.UNKNOWN)
        if on_host[place] and end > start:
            around.append(place)
    return parents


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_file_is_small_and_tells_of_no_machine_or_user(path: Path, tmp_path: Path) -> None:
    assert path.stat().st_size <= LARGEST
    plain = _unpacked(path, tmp_path)
    assert [found[0] for found in _FORBIDDEN.finditer(plain.read_bytes())] == []
    assert redact(plain) == []


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_the_command_line_reports_on_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["report", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Kernels that no rule knows" not in text
    assert "invalid" not in text
