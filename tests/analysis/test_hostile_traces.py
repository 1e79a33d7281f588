"""Files that are cut off, empty, damaged, huge or malicious: one clear error each, soon, and nothing is written."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.analysis.readers.any import read_capture, read_captures
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.core.errors import TraceError
from tests.analysis.nsys_files import NsysFile, three_steps_and_two_replays
from tests.analysis.profiler_traces import expert_parallel
from tests.support.run_folders import good_run

GOOD_CAPTURES = Path(__file__).parents[2] / "traces" / "good_captures"
SMALL = Limits(events=50, text_bytes=200_000, piece_bytes=10_000, seconds=5.0)


def _code(path: Path, limits: Limits | None = None) -> str:
    with pytest.raises(TraceError) as caught:
        read_capture(path) if limits is None else read_capture(path, limits)
    assert str(path) in str(caught.value) or caught.value.where
    return caught.value.code


def _sqlite(path: Path, *statements: str) -> Path:
    three_steps_and_two_replays().write(path)
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


def test_no_file_an_empty_one_and_one_of_no_known_format(tmp_path: Path) -> None:
    assert _code(tmp_path / "none") == "E060"
    assert _code(tmp_path) == "E060"
    path = tmp_path / "t.json"
    for content, code in ((b"", "E063"), (b"\x7fELF\x02\x01", "E060"), (b"PK\x03\x04 a zip", "E060")):
        path.write_bytes(content)
        assert _code(path) == code, content


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert _code(tmp_path / "pipe") == "E060"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "E061"),
        ('{"schemaVersion": 1', "E061"),
        ('{"schemaVersion": 1}', "E062"),
        ('{"traceEvents": []}', "E063"),
        ("[]", "E063"),
        ('{"traceEvents": [', "E061"),
        ('{"traceEvents": [{"ph": "X"', "E061"),
        ('{"traceEvents": [{"ph": "M"}', "E061"),
        ('{"traceEvents": [{"ph": "M"}]', "E061"),
        ('{"traceEvents": [{"ph": "M"}], "x"}', "E062"),
        ('{"traceEvents": [{"ph": "M"},]}', "E062"),
        ('{"traceEvents": [,{"ph": "M"}]}', "E062"),
        ('{"traceEvents": [{"ph": "M"},,{"ph": "M"}]}', "E062"),
        ('{"traceEvents": [{"ph": "M"}{"ph": "M"}]}', "E062"),
        ('[{"ph": "M"}] and more', "E062"),
        ('{"traceEvents": [1, 2]}', "E062"),
        ('{"traceEvents": [{"name": "no phase"}]}', "E062"),
        ('{"traceEvents": [{"ph": "X", "cat": ["a"]}]}', "E062"),
        ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k"}]}', "E062"),
        ("[" * 100_000, "E061"),
        ('{"traceEvents": [' + '{"a":' * 3_000 + "1" + "}" * 3_000 + "]}", "E062"),
    ],
)
def test_json_that_is_no_whole_trace(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    assert _code(path) == code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ts", '"5"'), ("ts", '"ns:5"'), ("ts", "1e300"), ("ts", "null"), ("ts", "9007199254740993000"), ("ts", "[1]"),
        ("dur", "-1"), ("dur", "-0.5"), ("name", "5"), ("stream", '"7"'), ("stream", "7.5"), ("device", "1e3"),
        ("device", str(1 << 40)), ("correlation", str(1 << 63)),
    ],
)  # fmt: skip
def test_values_that_cannot_be(tmp_path: Path, key: str, value: str) -> None:
    event = {"ph": '"X"', "cat": '"kernel"', "name": '"k"', "pid": "0", "tid": "7", "ts": "5", "dur": "1"}
    args = {"stream": "7", "device": "0", "correlation": "1"}
    (event if key in event else args)[key] = value
    said = ", ".join(f'"{k}": {v}' for k, v in args.items())
    text = ", ".join(f'"{k}": {v}' for k, v in event.items())
    path = tmp_path / "t.json"
    path.write_text(f'{{"traceEvents": [{{{text}, "args": {{{said}}}}}]}}')
    assert _code(path) == "E062"


def test_every_cut_of_a_trace_is_an_error(tmp_path: Path) -> None:
    whole = expert_parallel(layers=1, steps=1).write(tmp_path / "whole.json", indent=None).read_bytes()
    path = tmp_path / "t.json"
    for kept in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:kept])
        assert _code(path) in {"E061", "E063"}, kept
    packed = gzip.compress(whole)
    for kept in [*range(1, len(packed), 61), len(packed) - 1]:
        path.write_bytes(packed[:kept])
        assert _code(path) in {"E060", "E061"}, kept


def test_a_damaged_gzip(tmp_path: Path) -> None:
    path = expert_parallel().write(tmp_path / "t.json.gz")
    packed = bytearray(path.read_bytes())
    packed[-6] ^= 1  # within the checksum
    path.write_bytes(packed)
    assert _code(path) == "E062"
    packed[200] ^= 255
    path.write_bytes(packed)
    assert _code(path) in {"E061", "E062"}


def test_a_database_packed_with_xz(tmp_path: Path) -> None:
    plain = gzip.decompress((GOOD_CAPTURES / "path_b.nsys.sqlite.gz").read_bytes())
    packed, path = lzma.compress(plain), tmp_path / "t.sqlite.xz"
    path.write_bytes(packed)
    unpacked = tmp_path / "t.sqlite"
    unpacked.write_bytes(plain)
    read, expected = read_capture(path).tables(), read_capture(unpacked).tables()
    assert all((read[name] == expected[name]).all() for name in expected)
    half = len(plain) // 2
    path.write_bytes(lzma.compress(plain[:half]) + lzma.compress(plain[half:]))
    assert len(read_capture(path).gpu) == len(expected["gpu"]), "a file of two streams is one"
    for kept in [*range(6, len(packed), 97), len(packed) - 1]:
        path.write_bytes(packed[:kept])
        assert _code(path) == "E061", kept
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    path.write_bytes(damaged)
    assert _code(path) == "E062"
    path.write_bytes(packed + b"left over" * 3)
    assert _code(path) == "E062"
    path.write_bytes(lzma.compress(b"{}"))
    assert _code(path) == "E060"
    path.write_bytes(packed)
    assert _code(path, replace(DEFAULT_LIMITS, text_bytes=len(plain) - 1)) == "E064"


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    event = '{"ph": "X", "cat": "cpu_op", "name": "n", "pid": 1, "tid": 1, "ts": 1, "dur": 1}'
    path.write_text(f"[{', '.join([event] * 51)}]")
    assert _code(path, SMALL) == "E064"
    path.write_text(f"[{', '.join([event] * 50)}]")
    assert len(read_capture(path, SMALL).ranges) == 50
    assert _code(_sqlite(tmp_path / "s.sqlite"), Limits(events=5)) == "E064"


@pytest.mark.parametrize("filler", [b" ", b'"', b"[", b"\\", b'{"traceEvents":[', b'"traceEvents":['])
def test_a_file_that_unpacks_to_far_too_much_is_left_early(tmp_path: Path, filler: bytes) -> None:
    path = tmp_path / "t.json.gz"
    for start in (b"{", b'{"x": "', b'{"traceEvents": [', b'{"traceEvents": [{"ph": "'):
        path.write_bytes(gzip.compress(start + filler * (20_000_000 // len(filler)), 1))
        begun = time.monotonic()
        assert _code(path) in {"E061", "E062", "E064"}
        assert time.monotonic() - begun < 20


# -- SQLite --------------------------------------------------------------------------------------------------------

_ENDLESS = 'WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS start, x AS "end" FROM n'


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 'soon'", "E062"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 1.5", "E062"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = NULL", "E062"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = x'00ff'", "E062"),
        ('UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET "end" = start - 1', "E062"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 1 << 62, \"end\" = 1 << 62", "E062"),
        ("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET deviceId = 1 << 40", "E062"),
        ("UPDATE NVTX_EVENTS SET \"end\" = 5 WHERE \"end\" IS NOT NULL", "E062"),
        ("UPDATE StringIds SET value = x'ff00'", "E062"),
        ("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN streamId", "E062"),
        ("UPDATE META_DATA_EXPORT SET value = '4.0.0'", "E060"),
        ("DROP TABLE StringIds", "E060"),
        ("CREATE TABLE EPLB_RECORD (rank)", "E056"),
    ],
)  # fmt: skip
def test_tables_with_damaged_values(tmp_path: Path, statement: str, code: str) -> None:
    assert _code(_sqlite(tmp_path / "s.sqlite", statement)) == code


def test_an_export_without_events_is_empty(tmp_path: Path) -> None:
    file = NsysFile()
    file.call(0, 1, 1)
    assert _code(file.write(tmp_path / "s.sqlite")) == "E063"


@pytest.mark.parametrize(
    "statement", [f"CREATE VIEW CUPTI_ACTIVITY_KIND_MEMCPY AS {_ENDLESS}", "CREATE VIRTUAL TABLE x USING fts5(start)"]
)
def test_views_and_virtual_tables_are_not_read(tmp_path: Path, statement: str) -> None:
    assert len(read_capture(_sqlite(tmp_path / "s.sqlite", statement)).gpu) == 10


def test_a_generated_column_ends(tmp_path: Path) -> None:
    """A column may be an expression; it gets no more than its time."""
    slow = (
        "CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start, end AS (length(hex(zeroblob(60000000)))), deviceId, streamId)"
    )
    rows = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100000) INSERT INTO"
    rows += " CUPTI_ACTIVITY_KIND_MEMSET (start) SELECT x FROM n"
    begun = time.monotonic()
    assert _code(_sqlite(tmp_path / "s.sqlite", slow, rows), Limits(seconds=1)) in {"E062", "E064"}
    assert time.monotonic() - begun < 20


def test_every_cut_of_a_database_is_an_error(tmp_path: Path) -> None:
    whole = _sqlite(tmp_path / "whole.sqlite").read_bytes()
    path = tmp_path / "t.sqlite"
    for kept in range(16, len(whole), 509):
        path.write_bytes(whole[:kept])
        assert _code(path) == "E061", kept


def test_a_database_that_is_still_written(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    three_steps_and_two_replays().write(path)
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL")
        writer.commit()
        before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
        assert _code(path) == "E061"
        assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_a_packed_database(tmp_path: Path) -> None:
    packed = gzip.compress(_sqlite(tmp_path / "s.sqlite").read_bytes())
    path = tmp_path / "s.sqlite.gz"
    path.write_bytes(packed)
    capture = read_capture(path)
    assert (len(capture.gpu), capture.source) == (10, str(path))
    assert _code(path, Limits(text_bytes=1000)) == "E064"
    path.write_bytes(packed[:-20])
    assert _code(path) == "E061"


def test_a_report_without_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.nsys-rep"
    path.write_bytes(b"a report")
    monkeypatch.setattr("moe_eplb.analysis.readers.nsys_report.find_nsys", lambda: None)
    assert _code(path) == "E065"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ('cp SAMPLE "$5"', ""),
        ("echo no such report >&2; exit 3", "E065"),
        ("exit 0", "E065"),
        ("sleep 60 & sleep 60", "E065"),
        ('echo half > "$5"', "E061"),
    ],
)
def test_a_report_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: str) -> None:
    """A program in nsys's place; it is called as: export --type sqlite --output TARGET REPORT."""
    sample = _sqlite(tmp_path / "s.sqlite")
    program = tmp_path / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + script.replace("SAMPLE", str(sample)) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = tmp_path / "r.nsys-rep"
    path.write_bytes(b"a report")
    begun = time.monotonic()
    if code:
        assert _code(path, Limits(seconds=2)) == code
    else:
        assert (len(read_capture(path).gpu), read_capture(path).source) == (10, str(path))
    assert time.monotonic() - begun < 15


# -- anything at all -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    return {
        "nsys": three_steps_and_two_replays().write(folder / "s").read_bytes(),
        "records": (good_run().write(folder / "run") / "trace.sqlite").read_bytes(),
        "json": expert_parallel(layers=1, steps=1).write(folder / "t.json").read_bytes(),
        "gzip": expert_parallel(layers=1, steps=1).write(folder / "t.json.gz").read_bytes(),
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["nsys", "records", "json", "gzip"]), st.data())
def test_damage_of_any_kind_is_an_error_or_a_trace(
    samples: dict[str, bytes], tmp_path: Path, which: str, data: st.DataObject
) -> None:
    content = bytearray(samples[which])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "insert", "delete", "number"])):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 400))]
            case "number":
                content[at : at + 4] = b"\xff\xff\xff\x7f"
        content = content or bytearray(b"{")
    path = tmp_path / "t"
    path.write_bytes(content)
    with contextlib.suppress(TraceError):  # anything else is a failure
        read_captures([path], Limits(seconds=10))
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert path.read_bytes() == content
