"""Damaged traces through the readers and every analysis; `tests.analysis.fuzz_traces` does it for longer."""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.readers.limits import Limits
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture
from tests.analysis.fuzz_mutations import FORMS, mutated, samples
from tests.analysis.fuzz_traces import analyse, examine, within
from tests.analysis.nsys_files import PROCESS, THREAD, NsysFile

_SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, suppress_health_check=_SLOW)
@given(chance=st.randoms(use_true_random=False))
def test_damage_is_answered_by_an_error_or_by_figures(form: str, tmp_path: Path, chance: Random) -> None:
    examine(tmp_path / "t", mutated(form, chance))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_damaged_by_chance_is_sometimes_read(form: str, tmp_path: Path) -> None:
    """A mutation that nothing survives would test the first look at a file alone."""
    ends = {examine(tmp_path / "t", mutated(form, Random(f"{form} {seed}"))) for seed in range(40)}
    assert "read" in ends
    assert len(ends) > 1


@pytest.mark.parametrize("form", ["nsys", "records", "json"])
def test_the_undamaged_samples_are_read(form: str, tmp_path: Path) -> None:
    assert examine(tmp_path / "t", samples()[form]) == "read"
    assert examine(tmp_path / "t", gzip.compress(samples()[form])) == "read"


# -- captures that no reader would give ----------------------------------------------------------------------------

_TIME = st.integers(-50, 300) | st.sampled_from([-(1 << 58), 1 << 58])
_LENGTH = st.integers(0, 60) | st.sampled_from([1 << 57])
_NUMBER = st.sampled_from([-1, 0, 1, 7, 9, 1 << 30])
_GPU = st.tuples(st.sampled_from(Role), _TIME, _LENGTH, _NUMBER, _NUMBER, _NUMBER, st.integers(-1, 4), st.booleans())
_CALL = st.tuples(_TIME, _LENGTH, st.integers(-1, 4), st.sampled_from(["cudaDeviceSynchronize", "cudaLaunchKernel"]))
_RANGE = st.tuples(st.sampled_from(["layer 1", "route/0", "step", "x"]), _TIME, _LENGTH, st.booleans(), _NUMBER)
_WAIT = st.tuples(_NUMBER, _NUMBER, _TIME)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_GPU, min_size=1, max_size=8), st.lists(_CALL, max_size=6), st.lists(_RANGE, max_size=6),
    st.lists(_WAIT, max_size=3), st.lists(st.tuples(st.booleans(), _TIME, _LENGTH), max_size=3),
)  # fmt: skip
def test_any_capture_is_analysed(
    gpu: list[Any], calls: list[Any], ranges: list[Any], waits: list[Any], spans: list[Any]
) -> None:
    made = MakeCapture()
    for role, start, length, stream, iteration, layer, correlation, updater in gpu:
        kind = c.UPDATER_WORK if updater else c.KERNEL
        more = {"iteration": iteration, "layer": layer, "correlation": correlation, "kind": kind, "rank": stream & 1}
        made.gpu(role, start, start + length, stream, **more)
    for start, length, correlation, name in calls:
        made.call(start, start + length, correlation, name)
    for text, start, length, ours, payload in ranges:
        made.range(text, start, start + length, "moe_eplb" if ours else "", payload=payload)
    for stream, on, at in waits:
        made.wait(stream, on, at)
    for overhead, start, length in spans:
        made.span(c.OVERHEAD if overhead else c.CALLED_WORK, start, start + length)
    with within(10):
        analyse(made.done())


# -- much of everything --------------------------------------------------------------------------------------------

MANY = 20_000


def _many(each: Callable[[NsysFile, int], None]) -> NsysFile:
    file = NsysFile()
    for number in range(MANY):
        each(file, number)
    return file


def _of_names(file: NsysFile, number: int) -> None:
    file.call(number * 10, number * 10 + 1, number + 1)
    file.kernel(
        f"nccl_{'ab'[number % 2]}{chr(97 + number % 26)}{number:b}x", number * 10 + 2, number * 10 + 9, number + 1
    )


def _of_threads(file: NsysFile, number: int) -> None:
    thread = THREAD + number
    file.range(f"iteration {number}", number * 10, number * 10 + 9, thread=thread)
    file.call(number * 10 + 1, number * 10 + 2, number + 1, thread)
    file.kernel("gemm", number * 10 + 2, number * 10 + 9, number + 1)


def _of_layers(file: NsysFile, number: int) -> None:
    file.range(f"route/{number}", number * 10, number * 10 + 9, domainId=2)
    file.call(number * 10 + 1, number * 10 + 2, number + 1)
    file.kernel("gemm", number * 10 + 2, number * 10 + 9, number + 1)


def _nested(file: NsysFile, number: int) -> None:
    file.range(f"layer {number}", number, 10 * MANY - number)
    file.call(MANY + number, MANY + number + 1, number + 1)
    file.kernel("gemm", MANY + number, MANY + number + 5, number + 1, stream=7 + number % 2)


def _blocking(file: NsysFile, number: int) -> None:
    file.call(number, 2 * MANY - number, number + 1, name="cudaStreamSynchronize")
    file.kernel("gemm", MANY - number, MANY + number, number + 1)


@pytest.mark.parametrize("each", [_of_names, _of_threads, _of_layers, _nested, _blocking])
def test_cost_does_not_grow_with_the_square(each: Callable[[NsysFile, int], None], tmp_path: Path) -> None:
    file = _many(each)
    file.domain("moe_eplb", 2)
    path = file.write(tmp_path / "s")
    with within(30):
        analyse(read_capture(path))


@pytest.mark.parametrize("columns", ["streamId = rowid", "deviceId = rowid", f"globalPid = {PROCESS} + (rowid << 24)"])
def test_more_lanes_than_anybody_has_are_refused(columns: str, tmp_path: Path) -> None:
    path = _many(_of_names).write(tmp_path / "s")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET {columns}")
        connection.commit()
    with pytest.raises(TraceError, match="more than 4096 streams, ranks or processes") as caught:
        read_capture(path)
    assert caught.value.code == "E064"


def test_texts_are_kept_up_to_a_bound(tmp_path: Path) -> None:
    file = _many(_of_names)
    path = file.write(tmp_path / "s")
    with pytest.raises(TraceError, match="E064"):
        read_capture(path, Limits(kept_text=10_000))
    events = [
        {"ph": "X", "cat": "cpu_op", "name": f"{n}" * 50, "pid": 1, "tid": 1, "ts": n, "dur": 1} for n in range(500)
    ]
    (tmp_path / "t").write_text(json.dumps(events))
    with pytest.raises(TraceError, match="E064"):
        read_capture(tmp_path / "t", Limits(kept_text=10_000))
    assert len(read_capture(tmp_path / "t").ranges) == 500


# -- memory --------------------------------------------------------------------------------------------------------

_CHILD = """
import json, resource, sys
from pathlib import Path
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.core.errors import TraceError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
codes = {}
for name in sys.argv[1:]:
    try:
        read_capture(Path(name))
        codes[Path(name).name] = "read"
    except TraceError as error:
        codes[Path(name).name] = error.code
print(json.dumps([codes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def test_declared_lengths_are_not_taken_for_real(tmp_path: Path) -> None:
    """Files of a few KB that claim to hold gigabytes, in a process that may have two GiB and needs far less."""
    for name, content in _oversized().items():
        (tmp_path / name).write_bytes(content)
    _with_a_long_text(tmp_path / "long text")
    files = sorted(map(str, tmp_path.iterdir()))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *files], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    codes, grown_mb = json.loads(done.stdout)
    assert codes == {
        "pages": "E061", "page size": "E061", "packed spaces": "E064", "packed events": "E064", "packed zeros": "E062",
        "length at the end": "E062", "rows": "E062", "number": "E064", "text": "E064", "long text": "E062",
    }  # fmt: skip
    assert grown_mb < 200


def _oversized() -> dict[str, bytes]:
    database, text = samples()["nsys"], samples()["json"]
    packed = gzip.compress(text, mtime=0)
    start = b'{"traceEvents": ['
    return {
        "pages": database[:28] + b"\x7f\xff\xff\xff" + database[32:],
        "page size": database[:16] + b"\x00\x01" + database[18:28] + b"\x00\xff\xff\xff" + database[32:],
        "rows": _with_huge_cells(database),
        "packed spaces": _packed(b"{", b" ", 200 << 20),
        "packed events": _packed(start + b'{"ph": "', b"x", 200 << 20),
        "packed zeros": _packed(b"SQLite format 3\0" + database[16:100], b"\0", 100 << 10),
        "length at the end": packed[:-4] + b"\xff\xff\xff\xff",
        "number": start + b'{"ph": "X", "ts": ' + b"9" * (20 << 20),
        "text": start + b'{"ph": "' + b"X" * (20 << 20),
    }


def _packed(start: bytes, filler: bytes, length: int) -> bytes:
    packer, piece = zlib.compressobj(1, wbits=31), filler * (1 << 20)
    parts = [packer.compress(start), *(packer.compress(piece) for _ in range(length >> 20))]
    return b"".join([*parts, packer.compress(filler * (length % (1 << 20))), packer.flush()])


def _with_huge_cells(database: bytes) -> bytes:
    """Every row of the last table says that it is 2 GiB long."""
    content = bytearray(database)
    page = len(content) - 4096
    for number in range(int.from_bytes(content[page + 3 : page + 5], "big")):
        pointer = page + 8 + 2 * number
        cell = page + int.from_bytes(content[pointer : pointer + 2], "big")
        content[cell : cell + 5] = b"\x87\xff\xff\xff\x7f"
    return bytes(content)


def _with_a_long_text(path: Path) -> None:
    path.write_bytes(samples()["nsys"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE StringIds SET value = CAST(zeroblob(50000000) AS TEXT)  WHERE rowid = 1")
        connection.commit()


def test_lengths_whose_sum_no_number_holds_are_refused(tmp_path: Path) -> None:
    file = NsysFile()
    for number in range(5):
        file.kernel("gemm", 0, 1 << 60, number + 1)
    with pytest.raises(TraceError, match=r"gpu: they last 5\.76e\+18 ns together"):
        read_capture(file.write(tmp_path / "s"))


def test_a_wall_clock_beyond_all_times_is_refused(tmp_path: Path) -> None:
    file = NsysFile()
    file.kernel("gemm", 0, 1, 1)
    file.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=(1 << 63) - 1)
    with pytest.raises(TraceError, match="a wall clock of 9223372036854775807 ns"):
        read_capture(file.write(tmp_path / "s"))
