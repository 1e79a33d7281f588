"""The recipe of Nsight Systems says what ``eplbctl report`` says, with pandas and numpy alone."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.columns import ColumnTables
from moe_eplb.analysis.readers.nsys import TABLES, read_columns, read_nsys
from moe_eplb.analysis.readers.sqlite_tables import Database
from moe_eplb.core import yaml_source
from moe_eplb.core.errors import TraceError
from tests.analysis.nsys_files import NsysFile, export_of_everything, three_steps_and_two_replays

from .conftest import Answer, Call

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake_nsys_recipe"
RECIPE = ROOT / "eplbctl" / "nsys_recipes" / "eplb_overlap"
CAPTURES = sorted((ROOT / "traces" / "good_captures").glob("*.nsys.sqlite.gz"))
SAMPLE = os.environ.get("EPLB_NSYS_SAMPLE", "")
PARTS = ("ranks", "iterations", "layers", "streams")


@pytest.fixture
def nsys(tmp_path: Path) -> Path:
    """A folder with an nsys that knows recipes, whose Python has pandas and numpy and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "nsys"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(FAKE / "fake_nsys.py")])} "$@"\n')
    program.chmod(0o755)
    return folder


def _run(
    nsys: Path, *arguments: object, command: tuple[str, ...] = ("eplbctl", "nsys", "recipe"), **more: str
) -> Answer:
    environment = os.environ | {"PATH": f"{nsys}:{os.environ['PATH']}", "FAKE_NSYS_ONLY": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *command] if command[0] == "eplbctl" else list(command)
    done = subprocess.run(
        [*words, *map(str, arguments)], env=environment | more, capture_output=True, text=True, timeout=60, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def _report(path: Path) -> Path:
    """The report of Nsight Systems that an export came from; the stand-in looks only at the export."""
    report = path.with_suffix(".nsys-rep")
    report.touch()
    return report


def _unpacked(packed: Path, folder: Path) -> Path:
    target = folder / packed.name.removesuffix(".gz").replace(".nsys", "")
    target.write_bytes(gzip.decompress(packed.read_bytes()))
    return target


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return float(text) if "." in text or "e" in text else int(text)


def _overlap_of(folder: Path, file: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What the recipe says of one report, in the form of ``report --format json``; gaps are left out but in lengths."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _rows(folder, "overlap"):
        if row.pop("file") == file:
            pair, part = row.pop("pair"), row.pop("part")
            numbers = {key: _number(value) for key, value in row.items() if value or key == "overlap"}
            found.setdefault(pair, {}).setdefault(part, []).append(numbers)
    return found


def _overlap_said(said: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found = {}
    for pair, parts in said["overlap"].items():
        wanted = {part: [parts[part]] for part in ("whole", "updates", "steady")} | {
            part: parts[part] for part in PARTS
        }
        found[pair] = {part: rows for part, rows in wanted.items() if rows}
    return found


def _exports(folder: Path) -> list[Path]:
    exports = [_unpacked(path, folder) for path in CAPTURES]
    exports.append(export_of_everything().write(folder / "everything.sqlite"))
    exports.append(three_steps_and_two_replays().write(folder / "replays.sqlite"))
    if SAMPLE:
        exports.append(folder / "sample.sqlite")
        exports[-1].write_bytes(Path(SAMPLE).read_bytes())
    return exports


def test_the_figures_are_those_of_the_report(nsys: Path, tmp_path: Path, call: Call) -> None:
    exports = _exports(tmp_path)
    assert len(CAPTURES) >= 2
    answer = _run(nsys, "--input", *map(_report, exports), "--output", "out")
    assert answer.code == 0, answer.err
    assert sorted(row["file"] for row in _rows(Path("out"), "files")) == sorted(str(_report(path)) for path in exports)
    with_work = 0
    for export in exports:
        said = json.loads(call("report", export, "--format", "json").out)["trace"]
        file = str(_report(export))
        found = _overlap_of(Path("out"), file)
        assert found == _overlap_said(said)
        assert len(found) == 8
        with_work += bool(found["balancer"]["whole"][0]["total_ns"])
        for table in ("roles", "unknown"):
            rows = [row for row in _rows(Path("out"), table) if row.pop("file") == file]
            assert rows == [{key: str(value) for key, value in row.items()} for row in said[table]]
        idle = [(row["rank"], row["idle_ns"], row["host"]) for row in _rows(Path("out"), "idle") if row["file"] == file]
        assert idle == [(str(row["rank"]), str(row["idle_ns"]), str(row["causes"]["host"])) for row in said["idle"]]
        lengths = [int(row["length_ns"]) for row in _rows(Path("out"), "exposed") if row["file"] == file]
        assert lengths == [stretch["length_ns"] for stretch in said["exposed"]]
    assert with_work >= 3
    listed = json.loads(Path("out/out.nsys-analysis").read_text())["Outputs"]
    assert sorted(file["Name"] for file in listed) == sorted(path.name for path in Path("out").glob("*.csv"))
    assert " nan" not in answer.out.lower()


def test_a_report_that_cannot_be_judged_is_named_and_the_others_are_judged(nsys: Path, tmp_path: Path) -> None:
    good, empty, other = tmp_path / "good.sqlite", NsysFile(), NsysFile()
    three_steps_and_two_replays().write(good)
    empty.write(tmp_path / "empty.sqlite")
    other.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="4.0.0")
    other.write(tmp_path / "other.sqlite")
    (tmp_path / "none.sqlite").write_bytes(b"")
    reports = [_report(tmp_path / f"{name}.sqlite") for name in ("good", "empty", "other", "none")]
    answer = _run(nsys, "--input", *reports, "--output", "out")
    assert answer.code == 1
    assert "3 of 4 reports could not be judged, see files.csv" in answer.err
    assert "Traceback" not in answer.err
    errors = {Path(row["file"]).name: row["error"][:11] for row in _rows(Path("out"), "files")}
    assert errors == {
        "good.nsys-rep": "", "empty.nsys-rep": "error[E063]", "other.nsys-rep": "error[E060]",
        "none.nsys-rep": "error[E060]",
    }  # fmt: skip
    assert {row["file"] for row in _rows(Path("out"), "overlap")} == {str(reports[0])}


def test_the_recipe_takes_nothing_but_pandas_and_our_packages_and_says_where_it_belongs(
    nsys: Path, tmp_path: Path
) -> None:
    """`FAKE_NSYS_ONLY` refuses every other import, and ours until the recipe has found them beside itself."""
    elsewhere = tmp_path / "recipes" / "eplb_overlap"
    elsewhere.mkdir(parents=True)
    for path in RECIPE.iterdir():
        if path.is_file():
            (elsewhere / path.name).write_bytes(path.read_bytes())
    report = _report(three_steps_and_two_replays().write(tmp_path / "a.sqlite"))
    moved = _run(
        nsys, "--input", report, command=(str(nsys / "nsys"), "recipe", "eplb_overlap"),
        NSYS_RECIPE_PATH=str(elsewhere.parent),
    )  # fmt: skip
    assert moved.code == 1
    assert "eplb_overlap must stay where it is installed: there is no moe_eplb in " in moved.err
    there = _run(
        nsys, "--input", report, command=(str(nsys / "nsys"), "recipe", "eplb_overlap"),
        NSYS_RECIPE_PATH=str(RECIPE.parent),
    )  # fmt: skip
    assert there.code == 0, there.err
    assert Path("eplb_overlap-1/overlap.csv").exists()


def test_the_path_for_nsys(call: Call) -> None:
    answer = call("nsys", "recipe-path")
    assert (answer.code, answer.err) == (0, "")
    folder = Path(answer.out.strip())
    assert (folder / "eplb_overlap" / "metadata.json").is_file()
    metadata = json.loads((folder / "eplb_overlap" / "metadata.json").read_text())
    assert (folder / "eplb_overlap" / f"{metadata['module_name']}.py").is_file()


def test_nsys_gets_the_arguments_and_its_exit_code_is_ours(nsys: Path) -> None:
    (nsys / "nsys").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "$NSYS_RECIPE_PATH"\necho "$@"\nexit 41\n'
    )
    answer = _run(nsys, "--input", "a b.nsys-rep", "-o", "x", NSYS_RECIPE_PATH="/mine")
    assert answer.code == 41
    assert answer.out.splitlines() == [f"{RECIPE.parent}:/mine", "recipe eplb_overlap --input a b.nsys-rep -o x"]
    assert "recipe eplb_overlap --help" in _run(nsys, "--", "--help").out


def test_without_nsys_there_is_one_error(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("moe_eplb.recording.nsys_tool._candidates", lambda vendor: [])
    answer = call("nsys", "recipe", "--input", "a.nsys-rep")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E079]: the recipe runs in Nsight Systems, and none that runs was found\n")
    assert "eplbctl report FILE.sqlite" in answer.err


def test_an_nsys_that_cannot_be_started(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moe_eplb.recording.nsys_tool import Nsys

    monkeypatch.setattr("moe_eplb.recording.nsys_tool.find", lambda: Nsys(tmp_path / "nsys", "1"))
    answer = call("nsys", "recipe")
    assert answer.code == 2
    assert answer.err.startswith("error[E079]: nsys could not be started\n")


def test_the_rules_of_the_recipe_are_the_built_in_ones() -> None:
    built_in = ROOT / "moe_eplb" / "analysis" / "role_table.yaml"
    rules = json.loads((RECIPE / "role_table.json").read_text(encoding="utf-8"))
    assert rules == yaml_source.load_shipped(built_in.read_text(encoding="utf-8"), "built-in").data


# -- tables in memory ---------------------------------------------------------------------------------------------


def _in_memory(path: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """All tables of an export, as a library would hold them that has no whole numbers beside gaps."""
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    with closing(sqlite3.connect(path)) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            cursor = connection.execute(f'SELECT * FROM "{table}"')
            rows = cursor.fetchall()
            names = [column[0] for column in cursor.description]
            found[table] = {name: _held([row[at] for row in rows]) for at, name in enumerate(names)}
    return found


def _held(values: list[Any]) -> np.ndarray[Any, Any]:
    if all(isinstance(value, int) for value in values):
        return np.array(values, np.int64)
    if all(isinstance(value, int) or value is None for value in values) and any(value is not None for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return np.array(values, object)


def _same(one: Capture, other: Capture) -> bool:
    return all(np.array_equal(table, other.tables()[name]) for name, table in one.tables().items()) and (
        (one.names, one.streams, one.utc, one.incomplete, one.notes, one.form, one.rank_source)
        == (other.names, other.streams, other.utc, other.incomplete, other.notes, other.form, other.rank_source)
    )


def test_tables_in_memory_are_read_as_those_of_a_file(tmp_path: Path) -> None:
    for export in _exports(tmp_path):
        tables = _in_memory(export)
        assert _same(read_columns(export, tables), read_nsys(export)), export
        assert _same(read_columns(export, {k: v for k, v in tables.items() if k in TABLES}), read_nsys(export)), export


def test_every_table_that_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    for method in ("has", "integers", "texts", "pairs"):
        plain = getattr(Database, method)

        def noted(self: Database, table: str, *arguments: Any, _plain: Any = plain) -> Any:
            asked.add(table)
            return _plain(self, table, *arguments)

        monkeypatch.setattr(Database, method, noted)
    read_nsys(export_of_everything().write(tmp_path / "a.sqlite"))
    assert asked == set(TABLES)


@pytest.mark.parametrize(
    ("column", "gap", "found"),
    [
        (np.array([1, 2**63 + 5], np.uint64), 0, [1, 5 - 2**63]),  # as SQLite holds it
        (np.array([1.0, np.nan, 2.0**53]), -1, [1, -1, 2**53]),
        (np.array([1, None, float("nan"), 2**60], object), -1, [1, -1, -1, 2**60]),
        (np.array([], object), -1, []),
        (np.array([1.5]), 0, "fractions"),
        (np.array([2.0**53 + 2]), 0, "not exact"),
        (np.array([np.inf]), 0, "not exact"),
        (np.array(["1"], object), 0, "holds str"),
        (np.array([1, 2**63], object), 0, "t.x: "),
        (np.array([1.0, np.nan]), None, "1 gaps"),
        (np.array([1, None], object), None, "1 gaps"),
    ],
)
def test_whole_numbers_come_back_whole_or_not_at_all(
    column: np.ndarray[Any, Any], gap: int | None, found: list[int] | str
) -> None:
    tables = ColumnTables(Path("a.nsys-rep"), {"t": {"x": column}})
    required, optional = (("x",), {}) if gap is None else ((), {"x": gap})
    if isinstance(found, str):
        with pytest.raises(TraceError, match="E062") as caught:
            tables.integers("t", required, optional)
        assert found in caught.value.why
    else:
        assert tables.integers("t", required, optional)["x"].tolist() == found


def test_payloads_of_any_size_and_texts_with_gaps() -> None:
    columns = {
        "int64Value": np.array([5.0, np.nan, 2.0**62]), "text": np.array([None, "b" * 5000, float("nan")], object),
        "name": np.array(["a", "b", "a"], object), "value": np.array(["1", None, "3"], object),
    }  # fmt: skip
    tables = ColumnTables(Path("a"), {"t": columns})
    assert tables.integers("t", (), {"int64Value": -7})["int64Value"].tolist() == [5, -7, 2**53]
    assert tables.texts("t", "rowid", "text") == {1: "b" * 4096}
    assert tables.pairs("t") == {"a": "3", "b": ""}
    assert tables.integers("none", ("start",), {"end": 0})["end"].tolist() == []
    with pytest.raises(TraceError, match="t has no start"):
        tables.integers("t", ("start",))
    with pytest.raises(TraceError, match="holds int"):
        ColumnTables(Path("a"), {"t": {"k": np.array([1]), "text": np.array([3], object)}}).texts("t", "k", "text")
