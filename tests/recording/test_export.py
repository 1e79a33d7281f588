"""The exported file is what Nsight Systems' tools expect, complete, and the same every time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, RECORD, STREAMS, UPDATER, Kind
from moe_eplb.device.streams import AuxStreamType
from moe_eplb.recording.aligned_log import align
from moe_eplb.recording.event_log import EventLog
from moe_eplb.recording.export import write_trace
from moe_eplb.recording.log_format import Clock, LogHeader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(2):
        with EventLog(tmp_path / f"events.rank{rank}.bin", rank, capacity=100) as log:
            log.mark(Kind.START_ITER, -1, 0, HOST, a=3)
            log.mark(Kind.PLAN_DROPPED, 1, 0, 4, a=1)
            call = log.begin(Kind.START_WAIT_GPU_STAGE, 1, 0, HOST, a=7)
            log.end(log.begin(Kind.START_WAIT_GPU_STAGE, 1, 0, 4))
            log.end(call)
            log.end(log.begin(Kind.EXPERTS, 1, 0, 0), a=64)
            log.end(log.begin(Kind.PLAN, 1, 0, UPDATER), a=2, b=99)
            log.begin(Kind.COMBINE, 1, 0, 0)
    (tmp_path / "meta.json").write_text('{"tool": "moe_eplb", "seed": 5, "versions": {"numpy": "2"}}')
    return tmp_path


@pytest.fixture
def database(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(write_trace(folder))) as connection:
        yield connection


def test_host_calls_are_ranges_and_marks_of_our_domain(database: sqlite3.Connection) -> None:
    query = """SELECT COALESCE(n.text, s.value), n.eventType, n.int64Value, n.end IS NULL
               FROM NVTX_EVENTS n LEFT JOIN StringIds s ON s.id = n.textId WHERE n.globalTid >> 48 = 1"""
    assert database.execute(query).fetchall() == [
        ("moe_eplb", 75, None, 1),
        ("start_iter", 34, 0, 1),
        ("plan_dropped/1", 34, 0, 1),
        ("start_wait_gpu_stage/1", 59, 0, 0),
        ("plan/1", 59, 0, 0),
    ]


def test_device_work_is_kernels_linked_to_the_call_around_them(database: sqlite3.Connection) -> None:
    query = """SELECT k.deviceId, k.streamId, s.value, c.value, k.gridX FROM CUPTI_ACTIVITY_KIND_KERNEL k
               JOIN StringIds s ON s.id = k.shortName
               LEFT JOIN NVTX_EVENTS n ON n.rangeId = k.correlationId AND n.globalTid >> 24 = k.globalPid >> 24
               LEFT JOIN StringIds c ON c.id = n.textId"""
    expected: list[tuple[Any, ...]] = []
    for rank in range(2):
        expected.append((rank, 4, "start_wait_gpu_stage", "start_wait_gpu_stage/1", 0))
        expected.append((rank, 0, "experts", None, 0))
    assert database.execute(query).fetchall() == expected


def test_our_table_holds_every_record(database: sqlite3.Connection) -> None:
    query = 'SELECT seq, name, stream, layer, iteration, a, b, "end" IS NULL FROM EPLB_RECORD WHERE rank = 1'
    assert database.execute(query).fetchall() == [
        (0, "start_iter", HOST, -1, 0, 3, 0, 0),
        (1, "plan_dropped", 4, 1, 0, 1, 0, 0),
        (2, "start_wait_gpu_stage", HOST, 1, 0, 7, 0, 0),
        (3, "start_wait_gpu_stage", 4, 1, 0, 0, 0, 0),
        (4, "experts", 0, 1, 0, 64, 0, 0),
        (5, "plan", UPDATER, 1, 0, 2, 99, 0),
        (6, "combine", 0, 1, 0, 0, 0, 1),
    ]


def test_provenance_and_cost_are_stated(database: sqlite3.Connection) -> None:
    capture = dict(database.execute("SELECT name, value FROM META_DATA_CAPTURE"))
    assert capture["EPLB_META_SEED"] == "5"
    assert capture["EPLB_META_VERSIONS"] == '{"numpy": "2"}'
    assert float(capture["EPLB_RANK_1_OVERHEAD_NS_PER_RECORD"]) > 0
    assert capture["EPLB_RANK_0_DROPPED"] == "0"
    (version,) = database.execute("SELECT value FROM META_DATA_EXPORT WHERE name = 'EXPORT_SCHEMA_VERSION'").fetchone()
    assert version.startswith("3.")
    (epoch,) = database.execute("SELECT utcEpochNs FROM TARGET_INFO_SESSION_START_TIME").fetchone()
    assert epoch > 1_600_000_000 * 10**9
    names = database.execute("SELECT streamId, name FROM TARGET_INFO_NVTX_CUDA_STREAM WHERE vmId = 0").fetchall()
    assert names == [(0, "Main"), (4, "MoeBalancer")]


def test_streams_are_named_as_the_device_numbers_them() -> None:
    assert ("Main", *(kind.name for kind in AuxStreamType), "MoeBalancerStatistic") == STREAMS


def test_two_exports_are_equal(folder: Path) -> None:
    first = write_trace(folder).read_bytes()
    assert write_trace(folder).read_bytes() == first


def test_a_folder_without_logs_or_with_damaged_meta_is_an_error(folder: Path, tmp_path_factory: Any) -> None:
    with pytest.raises(TraceError, match="E051"):
        write_trace(tmp_path_factory.mktemp("empty"))
    (folder / "meta.json").write_text('{"tool": ')
    with pytest.raises(TraceError, match="E054"):
        write_trace(folder)


def _log(rank: int, monotonic: int, utc: int, starts: list[int]) -> tuple[LogHeader, np.ndarray]:
    records = np.zeros(len(starts), RECORD)
    records["start"] = starts
    records["end"] = [start and start + 10 for start in starts]
    return LogHeader(rank, 100, Clock(monotonic, utc), 0, -1, 1, True), records


def test_ranks_of_one_host_keep_the_order_of_their_common_clock() -> None:
    # Rank 1's UTC was stepped by 3 ms between the two samples; the monotonic clock is the same one.
    logs, epoch = align([_log(1, 2_000, 10**18 + 3_000_000, [2_500]), _log(0, 1_000, 10**18, [2_400])])
    assert epoch == 10**18
    assert [log.rank for log in logs] == [0, 1]
    assert [int(log.records["start"][0]) for log in logs] == [1_400, 1_500]


def test_ranks_of_two_hosts_meet_in_utc() -> None:
    logs, epoch = align([_log(0, 10**15, 10**18, [10**15 + 5]), _log(1, 77, 10**18 + 100, [80])])
    assert epoch == 10**18
    assert [int(log.records["start"][0]) for log in logs] == [5, 103]


def test_rows_that_were_never_written_are_holes() -> None:
    ((log,), _) = align([_log(0, 0, 10**18, [5, 0, 7])])
    assert (log.sequence.tolist(), log.holes) == ([0, 2], 1)


def test_two_logs_of_one_rank_are_an_error() -> None:
    with pytest.raises(TraceError, match="same rank"):
        align([_log(0, 0, 10**18, []), _log(0, 0, 10**18, [])])
