"""Redaction: what is planted is gone from the file's bytes, and nothing that a trace is read for has changed."""

from __future__ import annotations

import getpass
import gzip
import json
import lzma
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.recording.event_log import EventLog
from moe_eplb.recording.export import write_trace
from moe_eplb.recording.redact import redact
from moe_eplb.recording.redact_names import sensitive
from moe_eplb.recording.redact_text import REMOVED, Scrubber

REAL = os.environ.get("EPLB_NSYS_SAMPLE", "")
"""A real export to try redaction on, where one is at hand."""
HOME = "/home/erika.mustermann/secret-project"
PID, IDLE = 801 << 24, 977 << 24
UUID = "30600c9b-31ce-2415-4296-785f83fa4eb8"
OTHER_UUID = "d324d540-6a77-2638-1773-1a27951f75f7"
SECRETS = [
    "hunter2hunter2", "sk-aaaabbbbcccc", "erika.mustermann", "gpu-node-17", "secret-project", "1650223904417",
    "00:1a:2b:3c:4d:5e", "10.20.30.40", UUID, "bash_of_somebody", "train_arguments", "b83f:d203:00ab:cdef",
    "AWS_SECRET_ACCESS_KEY=wJalr", "left_on_a_free_page",
]  # fmt: skip
"""Every one is planted below in each format, at places where real captures hold such things."""

KERNEL = "void at::native::elementwise<4, /home/erika>(int)"  # a kernel's name is never touched, whatever it looks like
OWN_TEXTS = ["route/3", "HOME=/home/x is the name of our own range"]


def _sample(path: Path) -> Path:
    """A small export with the tables of Nsight Systems, and everything in it that must not be published."""
    strings = {
        1: KERNEL,
        2: OWN_TEXTS[0],
        3: "cudaLaunchKernel_v7000",
        4: "LD_PRELOAD=x AWS_SECRET_ACCESS_KEY=wJalr hunter2hunter2\nUSER=erika.mustermann",
        5: "python /home/erika.mustermann/secret-project/train.py --train_arguments",
        6: "range of another domain in /home/erika.mustermann/secret-project/model.py(3)",
        7: "bash_of_somebody",
        8: "foreign range at gpu-node-17 for erika.mustermann, 10.20.30.40",
        9: OWN_TEXTS[1],
    }
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE ProcessStreams (
                globalPid INTEGER NOT NULL,  -- Serialized GlobalId.
                filenameId INTEGER NOT NULL, -- REFERENCES StringIds(id) -- File name
                contentId INTEGER NOT NULL   -- REFERENCES StringIds(id) -- Stream content
            );
            CREATE TABLE NEWER_EVENTS (
                start INTEGER NOT NULL,
                label INTEGER              -- REFERENCES StringIds(id) -- of a table that we do not know
            );
            CREATE TABLE TARGET_INFO_SYSTEM_ENV (globalVid INTEGER, devStateName TEXT, name TEXT, value TEXT);
            CREATE TABLE TARGET_INFO_NIC_INFO (GUID INTEGER, stateName TEXT, name TEXT);
            CREATE TABLE TARGET_INFO_GPU (id INTEGER, name TEXT, uuid TEXT, serial INTEGER NOT NULL);
            CREATE TABLE TARGET_INFO_CUDA_DEVICE (gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT);
            CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
            CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
            CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
            CREATE TABLE ThreadNames (nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER);
            CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, text TEXT);
            CREATE TABLE NVTX_EVENTS (
                start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT, globalTid INTEGER,
                textId INTEGER, domainId INTEGER, jsonText TEXT, binaryData TEXT
            );
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (
                start INTEGER NOT NULL, end INTEGER NOT NULL, globalPid INTEGER, demangledName INTEGER NOT NULL,
                shortName INTEGER NOT NULL
            );
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, nameId INTEGER);
            PRAGMA secure_delete = OFF;
            CREATE TABLE scratch (value TEXT);
            INSERT INTO scratch VALUES ('left_on_a_free_page');
            """
        )
        fill: dict[str, list[tuple[Any, ...]]] = {
            "StringIds": list(strings.items()),
            "ProcessStreams": [(PID, 4, 5)],
            "NEWER_EVENTS": [(7, 6)],
            "TARGET_INFO_SYSTEM_ENV": [(1, "gpu-node-17", "HostName", "gpu-node-17")],
            "TARGET_INFO_NIC_INFO": [(1650223904417, "gpu-node-17", "mlx5 00:1a:2b:3c:4d:5e")],
            "TARGET_INFO_GPU": [(0, "NVIDIA H200", UUID, 1650223904417), (1, "NVIDIA H200", OTHER_UUID, 5)],
            "TARGET_INFO_CUDA_DEVICE": [(1, 0, 801, OTHER_UUID), (0, 1, 801, f"GPU-{UUID}")],
            "META_DATA_CAPTURE": [
                ("PROCESS_0:COMMAND", "python train.py --train_arguments"), ("PROCESS_0:USER_NAME", "erika.mustermann"),
                ("RATE_HZ", "0"), ("PROCESS_0:ENVIRONMENT", "HUNTER=hunter2hunter2"), ("NIC", "b83f:d203:00ab:cdef"),
                ("DEVICE_DISPLAY_NAME", "rack7-shown"),
            ],
            "META_DATA_EXPORT": [
                ("EXPORT_HOST", "gpu-node-17"), ("EXPORT_SCHEMA_VERSION", "3.20.3"),
                ("EXPORT_PARAM_INPUT_FILE", "secret-project/x.nsys-rep"),
            ],
            "PROCESSES": [(PID, 801, f"{HOME}/bin/python3.11"), (IDLE, 977, "sk-aaaabbbbcccc")],
            "ThreadNames": [(3, 20, PID + 801), (7, 20, IDLE + 977)],
            "DIAGNOSTIC_EVENT": [
                (5, "--api-key sk-aaaabbbbcccc was passed, serial number: 1650223904417"),
                (6, "on rack7-shown from /opt/a-site-of-ours/lib/libcupti.so.13.0"),
            ],
            "NVTX_EVENTS": [
                (0, None, 75, "moe_eplb", PID, None, 1, None, None), (0, None, 75, "other", PID, None, 2, None, None),
                (10, 20, 59, None, PID + 801, 2, 1, None, None),
                (11, 12, 59, OWN_TEXTS[1], PID + 801, None, 1, None, None),
                (21, 22, 59, None, PID + 801, 9, 1, None, None),
                (30, 40, 59, None, PID + 801, 8, 2, None, b"\x00\x01/home/erika.mustermann/x\xff"),
                (31, 32, 59, "TOKEN=hunter2hunter2", PID + 801, None, 2, f'{{"cwd": "{HOME}"}}', None),
            ],
            "CUPTI_ACTIVITY_KIND_KERNEL": [(12, 19, PID, 1, 1)],
            "CUPTI_ACTIVITY_KIND_RUNTIME": [(9, 11, PID + 801, 3)],
        }  # fmt: skip
        for table, rows in fill.items():
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        connection.commit()
        connection.execute("DROP TABLE scratch")  # without VACUUM its bytes stay in the file
        connection.commit()
    return path


def _rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def _dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


KEPT = {
    "ranges": "SELECT start, end, eventType, globalTid, textId, domainId FROM NVTX_EVENTS ORDER BY rowid",
    "kernels": "SELECT * FROM CUPTI_ACTIVITY_KIND_KERNEL",
    "calls": "SELECT * FROM CUPTI_ACTIVITY_KIND_RUNTIME",
    "kernel names": "SELECT value FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON id = demangledName",
    "own texts": "SELECT COALESCE(text, value) FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId WHERE domainId = 1",
    "devices": "SELECT cudaId, g.id FROM TARGET_INFO_CUDA_DEVICE JOIN TARGET_INFO_GPU g ON g.id = gpuId",
    "versions": "SELECT value FROM META_DATA_EXPORT WHERE name = 'EXPORT_SCHEMA_VERSION'",
    "api names": "SELECT value FROM CUPTI_ACTIVITY_KIND_RUNTIME JOIN StringIds ON id = nameId",
}


UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress}


def _present(path: Path) -> list[str]:
    data = UNPACK[path.suffix](path.read_bytes()) if path.suffix in UNPACK else path.read_bytes()
    return [secret for secret in SECRETS if secret.encode() in data]


@pytest.mark.parametrize("zipped", ["", "gz", "xz"])
def test_no_planted_secret_is_left_in_the_bytes_of_an_export(zipped: str, tmp_path: Path) -> None:
    path = _sample(tmp_path / "nsys.sqlite")
    before = {name: _rows(path, query) for name, query in KEPT.items()}
    assert _present(path) == SECRETS
    if zipped:
        path = _zip(path, zipped)
    removed = redact(path)
    assert _present(path) == []
    assert not any(secret in text for text in removed for secret in SECRETS)
    if zipped:
        path = _unzip(path)
    assert {name: _rows(path, query) for name, query in KEPT.items()} == before
    assert _rows(path, "SELECT value FROM META_DATA_CAPTURE WHERE name = 'DEVICE_DISPLAY_NAME'") == [("(removed)",)]
    told = [text for (text,) in _rows(path, "SELECT text FROM DIAGNOSTIC_EVENT")]
    assert told[1] == "on (removed) from (removed)/libcupti.so.13.0"
    assert _rows(path, "PRAGMA freelist_count") == [(0,)]
    assert _rows(path, "PRAGMA integrity_check") == [("ok",)]
    assert _rows(path, "SELECT SUM(serial) FROM TARGET_INFO_GPU") == [(0,)]
    assert list(tmp_path.iterdir()) == [path]


def _zip(path: Path, suffix: str = "gz") -> Path:
    zipped = path.with_name(f"{path.name}.{suffix}")
    zipped.write_bytes((gzip if suffix == "gz" else lzma).compress(path.read_bytes()))
    path.unlink()
    return zipped


def _unzip(path: Path) -> Path:
    plain = path.with_suffix("")
    plain.write_bytes(UNPACK[path.suffix](path.read_bytes()))
    path.unlink()
    return plain


def test_what_was_removed_is_told_and_a_second_time_there_is_nothing(tmp_path: Path) -> None:
    path = _sample(tmp_path / "nsys.sqlite")
    removed = redact(path)
    assert {"TARGET_INFO_SYSTEM_ENV: 1 rows", "TARGET_INFO_NIC_INFO: 1 rows", "ProcessStreams: 1 rows"} <= set(removed)
    assert {"PROCESSES: 1 rows", "ThreadNames: 1 rows", "TARGET_INFO_GPU.uuid: 2 texts"} <= set(removed)
    assert {"META_DATA_CAPTURE.value: 4 texts", "StringIds: 3 texts that nothing points to"} <= set(removed)
    once = _dump(path)
    assert redact(path) == []
    assert _dump(path) == once


def test_devices_are_still_told_apart_by_what_stands_for_their_uuids(tmp_path: Path) -> None:
    path = _sample(tmp_path / "nsys.sqlite")
    redact(path)
    pairs = _rows(path, "SELECT cudaId, g.id FROM TARGET_INFO_CUDA_DEVICE d JOIN TARGET_INFO_GPU g ON g.uuid = d.uuid")
    assert sorted(pairs) == [(0, 1), (1, 0)]


def test_a_string_of_a_table_that_is_not_known_stays_by_what_its_definition_says(tmp_path: Path) -> None:
    path = _sample(tmp_path / "nsys.sqlite")
    redact(path)
    text = _rows(path, "SELECT value FROM NEWER_EVENTS JOIN StringIds ON id = label")[0][0]
    assert text == "range of another domain in (removed)/model.py(3)"


def test_a_program_keeps_its_own_name(tmp_path: Path) -> None:
    path = _sample(tmp_path / "nsys.sqlite")
    redact(path)
    assert _rows(path, "SELECT pid, name FROM PROCESSES") == [(801, "(removed)/python3.11")]


def test_our_own_trace_keeps_every_record_and_loses_how_the_program_was_called(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.rank0.bin", 0, capacity=10) as log:
        log.mark(Kind.START_ITER, -1, 0, HOST)
        log.end(log.begin(Kind.EXPERTS, 1, 0, 0), a=64)
    meta = {"argv": ["eplbctl", "--train_arguments"], "env": {"OMP_NUM_THREADS": "hunter2hunter2"}, "seed": 5}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    path = write_trace(tmp_path)
    tables = ["EPLB_RECORD", "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL", "StringIds", "PROCESSES", "ThreadNames"]
    before = [_rows(path, f"SELECT * FROM {table}") for table in tables]
    assert redact(path) == ["META_DATA_CAPTURE.value: 2 texts"]
    assert [_rows(path, f"SELECT * FROM {table}") for table in tables] == before
    assert _present(path) == []
    assert _rows(path, "SELECT value FROM META_DATA_CAPTURE WHERE name = 'EPLB_META_SEED'") == [("5",)]


def test_no_real_export_loses_a_time_or_a_name_of_a_kernel(tmp_path: Path) -> None:
    if not REAL:
        pytest.skip("EPLB_NSYS_SAMPLE names no real export")
    path = tmp_path / "nsys.sqlite"
    shutil.copyfile(REAL, path)
    queries = [
        "SELECT start, end, globalTid, COALESCE(text, value) FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId",
        "SELECT k.*, value FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds ON id = demangledName",
        "SELECT k.*, value FROM CUPTI_ACTIVITY_KIND_RUNTIME k JOIN StringIds ON id = nameId",
        "SELECT * FROM CUDA_GRAPH_NODE_EVENTS",
    ]
    before = [_rows(path, query) for query in queries]
    removed = redact(path)
    assert [_rows(path, query) for query in queries] == before
    assert b"30600c9b-31ce-2415" not in path.read_bytes()
    assert "TARGET_INFO_GPU.uuid: 2 texts" in removed
    assert redact(path) == []


def _chrome(path: Path) -> Path:
    """A trace of the torch profiler, written by hand so that the digits of its times are known."""
    document = """{
  "schemaVersion": 1,
  "deviceProperties": [{"id": 0, "name": "NVIDIA H200", "uuid": "GPU-UUID", "serialNumber": 1650223904417}],
  "hostName": "gpu-node-17", "user_name": "erika.mustermann", "environ": {"A": "hunter2hunter2"},
  "nic": ["mlx5 00:1a:2b:3c:4d:5e b83f:d203:00ab:cdef", "10.20.30.40"],
  "argv": ["python", "--train_arguments"], "baseTimeNanoseconds": 1795397297233041759,
  "AWS_SECRET_ACCESS_KEY=wJalr": 1,
  "traceEvents": [
  {"ph": "X", "cat": "kernel", "name": "KERNEL", "ts": 1795397297233041.759, "dur": 3.100, "args": {"stream": 7}},
  {"ph": "X", "cat": "range", "name": "OWN", "ts": 1e3, "dur": -0.50, "args": {"domain": "moe_eplb"}},
  {"ph": "X", "cat": "python_function", "name": "FOLDER/model.py(34): forward", "ts": 5},
  {"ph": "X", "cat": "cpu_op", "name": "left_on_a_free_page=1", "args": {"T": "for erika.mustermann at gpu-node-17"}},
  {"ph": "M", "name": "process_name", "pid": 3, "args": {"name": "bash_of_somebody --train_arguments"}},
  {"ph": "M", "name": "process_labels", "pid": 3, "args": {"labels": "CPU"}}
  ],
  "traceName": "FOLDER/runs/kineto.json",
  "note": "--api-key sk-aaaabbbbcccc"
}"""
    for word, value in {"UUID": UUID, "KERNEL": KERNEL, "OWN": OWN_TEXTS[1], "FOLDER": HOME}.items():
        document = document.replace(word, value)
    path.write_text(document)
    return path


HARMLESS = {"left_on_a_free_page", "bash_of_somebody"}
"""In JSON these are names of an operation and a program, which stay."""


@pytest.mark.parametrize("zipped", [False, True])
def test_no_planted_secret_is_left_in_a_chrome_trace(zipped: bool, tmp_path: Path) -> None:
    path = _chrome(tmp_path / "kineto.json")
    assert set(_present(path)) == set(SECRETS)
    if zipped:
        path = _zip(path)
    removed = redact(path)
    assert set(_present(path)) == HARMLESS
    assert not any(secret in text for text in removed for secret in SECRETS)
    assert redact(path) == []
    data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    for digits in (
        b'"ts":1795397297233041.759,',
        b'"dur":3.100,',
        b'"ts":1e3,',
        b'"dur":-0.50,',
        b":1795397297233041759,",
    ):
        assert digits in data
    events = json.loads(data)["traceEvents"]
    assert [event["name"] for event in events[:3]] == [KERNEL, OWN_TEXTS[1], "(removed)/model.py(34): forward"]
    assert [event["args"] for event in events[4:]] == [{"name": "bash_of_somebody"}, {"labels": "CPU"}]


def test_a_compressed_trace_has_neither_name_nor_time_in_its_header(tmp_path: Path) -> None:
    paths = [_zip(_chrome(tmp_path / name)) for name in ("a.json", "b.json")]
    for path in paths:
        redact(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"a.json" not in paths[0].read_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"neither", b"{", b'{"a": ', b"\x1f\x8b", gzip.compress(b"{}")[:-6], lzma.compress(b"{}")[:-6],
        b"\xfd7zXZ\0left over", b"SQLite format 3\0" + b"x" * 200,
        b"\xff{}",
    ],
)  # fmt: skip
def test_what_cannot_be_redacted_is_an_error_and_stays_as_it_is(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "capture"
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        redact(path)
    assert caught.value.code == "E068"
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E068"):
        redact(tmp_path / "nothing.sqlite")


def test_this_user_this_machine_and_its_secrets_are_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "wilhelmine")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-of-mine")
    monkeypatch.setenv("MY_API_TOKEN", "a-value-without-a-pattern")
    monkeypatch.setenv("NOT_SPECIAL", "ordinary-value")
    texts = {
        "wilhelmine on node-of-mine": f"{REMOVED} on {REMOVED}",
        "it is a-value-without-a-pattern": f"it is {REMOVED}",
        "ordinary-value": "ordinary-value",
        f"{tmp_path}/run/events.bin": f"{REMOVED}/events.bin",
        f"at {tmp_path}": f"at {REMOVED}",
    }
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(list(texts)))
    redact(path)
    assert json.loads(path.read_text()) == list(texts.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PATH=/usr/bin HOME=/root x", f"PATH={REMOVED} HOME={REMOVED}"),
        ("http_proxy=http://a:b@c/", f"http_proxy={REMOVED}"),
        ("see https://me:word@host/x", f"see https://{REMOVED}@host/x"),
        ("/root", REMOVED),
        ("/root/.cache/x", REMOVED),
        ("/usr/lib/libcuda.so.1", "/usr/lib/libcuda.so.1"),
        ("/workshop", "/workshop"),
        ("a/home/x.py", "a/home/x.py"),
        ("aten::add", "aten::add"),
        ("<<<grid=1>>> rank=3", "<<<grid=1>>> rank=3"),
        ("13.0.85", "13.0.85"),
        (f"GPU-{UUID.upper()} {UUID} {OTHER_UUID}", "(uuid 0) (uuid 0) (uuid 1)"),
        ("", ""),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert Scrubber().text(text) == expected


@given(st.text(alphabet="aA=_/ .-:01\n;'\"()homeruEX", max_size=60))
def test_scrubbing_twice_is_scrubbing_once(text: str) -> None:
    scrubber = Scrubber(["/home/a"], ["mare"], {"A_KEY": "rueXrueX"})
    once = scrubber.text(text)
    assert scrubber.text(once) == once


@pytest.mark.parametrize("name", ["USER_NAME", "hostName", "PROCESS_0:COMMAND", "gpu_uuid", "environ", "SerialNumber"])
def test_names_of_fields_that_must_not_keep_their_values(name: str) -> None:
    assert sensitive(name)


@pytest.mark.parametrize(
    "name", ["name", "textId", "streamId", "busLocation", "args", "cat", "DEVICE_ID", "LAUNCH_AS_ROOT"]
)
def test_names_of_fields_that_may(name: str) -> None:
    assert not sensitive(name)
