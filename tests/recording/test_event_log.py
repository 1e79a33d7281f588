"""The log keeps everything that was recorded, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, UPDATER, Kind
from moe_eplb.recording.event_log import EventLog, last_event
from moe_eplb.recording.log_format import HEADER_BYTES, read_log


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    path = tmp_path / "events.rank3.bin"
    with EventLog(path, 3, capacity=10) as log:
        outer = log.begin(Kind.ROUTE, 7, 42, HOST, a=5, b=-1)
        log.mark(Kind.PLAN_DROPPED, 2, 43, 4, a=2**40, b=1)
        log.end(outer, b=9)
    header, records = read_log(path)
    assert (header.rank, header.closed, header.dropped, header.pid) == (3, True, 0, os.getpid())
    assert header.overhead_ps > 0
    first, second = records
    names = ("kind", "stream", "layer", "iteration", "a", "b")
    assert [int(first[name]) for name in names] == [Kind.ROUTE, HOST, 7, 42, 5, 9]
    assert [int(second[name]) for name in names] == [Kind.PLAN_DROPPED, 4, 2, 43, 2**40, 1]
    assert first["start"] < second["start"] == second["end"] < first["end"]
    assert int(first["thread"]) == threading.get_native_id()


def test_closing_cuts_the_file_to_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = EventLog(path, 0, capacity=1000)
    for _ in range(3):
        log.mark(Kind.STEP, -1, 0, HOST)
    log.close()
    log.close()
    assert path.stat().st_size == HEADER_BYTES + 3 * 48


def test_a_full_log_counts_what_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EventLog(path, 0, capacity=2) as log:
        tokens = [log.begin(Kind.STEP, -1, i, HOST) for i in range(4)]
        for token in tokens:
            log.end(token)
        log.mark(Kind.STEP, -1, 4, HOST)
    header, records = read_log(path)
    assert tokens == [0, 1, -1, -1]
    assert header.dropped == 3
    assert records["iteration"].tolist() == [0, 1]


def test_threads_never_share_a_row(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EventLog(path, 0, capacity=4000) as log:

        def record(stream: int) -> None:
            for i in range(1000):
                log.end(log.begin(Kind.PLAN, 0, i, stream))

        threads = [threading.Thread(target=record, args=(stream,)) for stream in (UPDATER, HOST, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    _, records = read_log(path)
    assert len(records) == 3000
    for stream in (UPDATER, HOST, 0):
        assert records[records["stream"] == stream]["iteration"].tolist() == list(range(1000))
    assert len(set(records["thread"].tolist())) == 3


_VICTIM = """
import os, signal, sys
from pathlib import Path
from moe_eplb.core.events import HOST, Kind
from moe_eplb.recording.event_log import EventLog
log = EventLog(Path(sys.argv[1]), 1, capacity=5000)
for i in range(1000):
    log.end(log.begin(Kind.ROUTE, 0, i, HOST))
log.begin(Kind.EXPERTS, 6, 1000, 0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leaves_all_it_recorded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _VICTIM, str(path)], cwd=root, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    header, records = read_log(path)
    assert not header.closed
    assert records["iteration"].tolist() == list(range(1001))
    last = last_event(path)
    assert last is not None
    assert (last.name, last.layer, last.iteration, last.stream, last.open) == ("experts", 6, 1000, 0, True)
    assert last.age_ns > 0


def test_last_event_of_a_living_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with EventLog(path, 0, capacity=100) as log:
        assert last_event(path) is None
        log.end(log.begin(Kind.DISPATCH, 1, 2, 0))
        last = last_event(path)
    assert last is not None
    assert (last.name, last.open, last.sequence) == ("dispatch", False, 0)


@pytest.mark.parametrize("keep", [10, HEADER_BYTES + 100, HEADER_BYTES + 48])
def test_a_cut_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "log"
    log = EventLog(path, 0, capacity=100)
    log.mark(Kind.STEP, -1, 0, HOST)
    os.truncate(path, keep)
    with pytest.raises(TraceError, match="E052"):
        read_log(path)


def test_a_file_that_is_no_log_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * (HEADER_BYTES + 48))
    with pytest.raises(TraceError, match="E052"):
        read_log(path)
    with pytest.raises(TraceError, match="E051"):
        read_log(tmp_path / "absent")


def test_a_log_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="E053"):
        EventLog(tmp_path / "no" / "folder", 0)
    with pytest.raises(TraceError, match="E053"):
        EventLog(tmp_path / "log", 0, capacity=0)
