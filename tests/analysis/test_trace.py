"""What was exported is read back, quickly, and damage is an error."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from moe_eplb.analysis.trace import OPEN, read_trace
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, RECORD, Kind
from moe_eplb.recording.export import write_trace
from moe_eplb.recording.log_format import HEADER_BYTES, Clock, LogHeader
from tests.support.run_folders import good_run


def test_records_come_back_in_the_order_of_their_logs(tmp_path: Path) -> None:
    run = good_run()
    trace = read_trace(run.write(tmp_path) / "trace.sqlite")
    assert len(trace.records) == len(run.records)
    assert (np.diff(trace.records.rank) >= 0).all()
    of_rank = dict(trace.records.by_rank())
    assert sorted(of_rank) == [0, 1]
    assert (np.diff(of_rank[1].seq) == 1).all()
    waits = of_rank[1].host.kinds(Kind.START_WAIT_GPU_STAGE)
    assert waits.layer.tolist() == [0, 1] * 4
    assert waits.a.tolist() == [7] * 8
    assert (of_rank[1].device.stream < HOST - 1).all()


def test_state_of_the_logs(tmp_path: Path) -> None:
    run = good_run()
    run.dropped[1] = 5
    run.not_closed.add(0)
    trace = read_trace(run.write(tmp_path) / "trace.sqlite")
    assert (trace.ranks[0].closed, trace.ranks[0].overhead_ns, trace.ranks[1].dropped) == (False, None, 5)
    assert trace.incomplete() == "rank 0: log not closed; rank 1: 5 records dropped"


def test_an_open_range_has_no_end(tmp_path: Path) -> None:
    run = good_run()
    (experts,) = run.find_records(Kind.EXPERTS, host=False, rank=0, layer=1, iteration=3)
    experts["end"] = 0
    trace = read_trace(run.write(tmp_path) / "trace.sqlite")
    kinds = trace.records.kinds(Kind.EXPERTS)
    assert (kinds.end == OPEN).sum() == 1
    assert len(kinds.device) == len(kinds) - 1


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE EPLB_RECORD",
        "DELETE FROM META_DATA_CAPTURE WHERE name = 'EPLB_RANK_1_DROPPED'",
        "UPDATE META_DATA_CAPTURE SET value = 'many' WHERE name = 'EPLB_RANK_1_DROPPED'",
        'UPDATE EPLB_RECORD SET "end" = start - 5 WHERE kind = 33',
        "UPDATE EPLB_RECORD SET layer = 'x' WHERE seq = 3",
    ],
)
def test_damage_is_an_error(tmp_path: Path, damage: str) -> None:
    path = good_run().write(tmp_path) / "trace.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with pytest.raises(TraceError, match="E056"):
        read_trace(path)


def test_no_file_and_no_database(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E055"):
        read_trace(tmp_path / "trace.sqlite")
    (tmp_path / "trace.sqlite").write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(TraceError, match="E056"):
        read_trace(tmp_path / "trace.sqlite")


def test_a_hundred_thousand_records_are_read_within_two_seconds(tmp_path: Path) -> None:
    count = 100_000
    records = np.zeros(count, RECORD)
    records["start"] = 5_000 + np.arange(count) * 10
    records["end"] = records["start"] + 7
    records["kind"] = Kind.EXPERTS
    header = LogHeader(0, count, Clock(1, 2), 0, -1, 1, True)
    (tmp_path / "events.rank0.bin").write_bytes(header.pack().ljust(HEADER_BYTES, b"\0") + records.tobytes())
    path = write_trace(tmp_path)
    before = time.perf_counter()
    trace = read_trace(path)
    assert time.perf_counter() - before < 2
    assert len(trace.records) == count
