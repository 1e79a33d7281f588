"""What is written reads back as it was, but for what the writer says that it cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Names, Table, filled
from moe_eplb.analysis.merge import merge
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.role_table import load_role_table
from moe_eplb.analysis.roles import located
from moe_eplb.analysis.writers.chrome import chrome_losses, write_chrome
from moe_eplb.analysis.writers.sqlite import losses, write_sqlite
from moe_eplb.core.errors import UsageError

from .nsys_files import three_steps_and_two_replays
from .profiler_traces import expert_parallel

ROOT = Path(__file__).resolve().parents[2]
TIMES = st.integers(-(2**40), 2**50)
LENGTHS = st.integers(0, 2**40)
NAMES = ("gemm<1>", 'a "quote" \\ and\nmore', "größe 🚀", "\u202ertl", "x" * 300)


def _table(dtype: Any, rows: list[dict[str, int]]) -> Table:
    columns = {name: np.array([row[name] for row in rows], np.int64) for name in (rows[0] if rows else ())}
    return filled(dtype, len(rows), **columns)


@st.composite
def captures(draw: st.DrawFn, *, ranks: int = 2) -> Capture:
    """Anything that both formats hold, of which some events have a role, a layer and an iteration of their own."""
    names = Names()
    texts = st.sampled_from(names.numbers(NAMES))
    main, sub = names["user_annotation"], names["cpu_op"]
    rank = st.integers(0, ranks - 1)

    def times() -> dict[str, int]:
        start = draw(TIMES)
        end = start + draw(LENGTHS)
        return {"start": start, "end": 0 if end == c.UNKNOWN else end}  # which says that a range was never closed

    def rows(most: int, make: Any) -> list[dict[str, int]]:
        found = []
        for _ in range(draw(st.integers(0, most))):
            number = draw(rank)
            found.append({**times(), "rank": number, "process": number, **make()})
        return found

    def gpu() -> dict[str, int]:
        return {
            "stream": draw(st.integers(0, 9)), "correlation": draw(st.integers(1, 99)), "device": draw(rank),
            "name": draw(texts), "kind": c.KERNEL, "graph_node": draw(st.sampled_from([c.UNKNOWN, 7])), "bytes": 0,
            "role": draw(st.sampled_from([c.UNSET_ROLE, 0, 3])), "layer": draw(st.sampled_from([c.UNKNOWN, 5])),
            "iteration": draw(st.sampled_from([c.UNKNOWN, 2])),
        }  # fmt: skip

    def host() -> dict[str, int]:
        return {"thread": draw(st.integers(1, 4))}

    made = Capture(
        "drawn", "test", tuple(names), _table(c.GPU, rows(6, gpu)),
        calls=_table(c.CALL, rows(4, lambda: host() | {"correlation": draw(st.integers(1, 99)), "name": draw(texts)})),
        ranges=_table(c.RANGE, rows(4, lambda: host() | {"text": draw(texts), **draw(_domains(main, sub))})),
        syncs=_table(c.SYNC, rows(3, lambda: {
            "stream": draw(st.integers(0, 9)), "correlation": draw(st.integers(1, 99)), "device": draw(rank),
            "on_stream": draw(st.integers(0, 9)), "on_correlation": draw(st.integers(1, 99)), "kind": c.SYNC_WAIT,
        })),
        spans=_table(c.HOST_SPAN, rows(2, lambda: host() | {"kind": c.OVERHEAD})),
        incomplete=draw(st.sampled_from(["", "3 events were dropped"])), utc=draw(st.sampled_from([None, 10**18])),
    )  # fmt: skip
    return made.in_order()


def _domains(main: int, sub: int) -> st.SearchStrategy[dict[str, int]]:
    return st.just({"domain": main, "kind": c.PUSH_POP})


def _rows(capture: Capture, table: str, *without: str) -> list[tuple[Any, ...]]:
    """Rows with texts instead of their numbers, and threads and processes in the order in which they first occur."""
    found = getattr(capture, table)
    texts = {"name", "text", "domain", "category"}
    columns = [name for name in found.dtype.names if name not in without]
    plain = []
    for row in found.tolist():
        named = dict(zip(found.dtype.names, row, strict=True))
        plain.append(
            tuple(
                (capture.names[named[n]] if named[n] >= 0 else "") if n in texts else named[n]
                for n in columns
            )
        )  # fmt: skip
    return sorted(plain)


TABLES = ("gpu", "calls", "ranges", "syncs", "spans")
RENUMBERED = ("process", "thread")


def _same(one: Capture, other: Capture, *without: str, tables: tuple[str, ...] = TABLES) -> None:
    for table in tables:
        assert _rows(one, table, *RENUMBERED, *without) == _rows(other, table, *RENUMBERED, *without), table
    assert one.incomplete == other.incomplete


_FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FILES
@given(captures())
def test_sqlite_reads_back(tmp_path: Path, capture: Capture) -> None:
    path = tmp_path / "t.sqlite"
    path.unlink(missing_ok=True)
    write_sqlite(capture, path)
    if not len(capture.gpu) and not len(capture.ranges):
        return
    again = read_capture(path)
    _same(again, capture)
    assert losses(capture) == []
    assert again.utc == capture.utc
    if len(capture.gpu):
        assert again.rank_source == "stated"


@_FILES
@given(captures(ranks=1))
def test_chrome_reads_back(tmp_path: Path, capture: Capture) -> None:
    path = tmp_path / "t.json"
    write_chrome(capture, path, packed=False)
    if not len(capture.gpu) and not len(capture.ranges):
        return
    again = read_capture(path)
    _same(again, capture)
    assert chrome_losses(capture) == []
    json.loads(path.read_text())


@_FILES
@given(captures(ranks=1))
def test_one_format_through_the_other(tmp_path: Path, capture: Capture) -> None:
    if not len(capture.gpu):
        return
    first, second = tmp_path / "a.sqlite", tmp_path / "b.json.gz"
    first.unlink(missing_ok=True)
    write_sqlite(capture, first)
    write_chrome(read_capture(first), second, packed=True)
    _same(read_capture(second), capture)


@pytest.mark.parametrize("run", ["two_ranks_gathered", "two_ranks_local_ids"])
def test_a_run_folder_as_sqlite(tmp_path: Path, run: str) -> None:
    capture = read_capture(ROOT / "traces" / "good" / run)
    write_sqlite(capture, tmp_path / "t.sqlite")
    again = read_capture(tmp_path / "t.sqlite")
    on_device = capture.with_tables({"gpu": capture.gpu[capture.gpu["kind"] != c.UPDATER_WORK]})
    _same(again, on_device)
    assert again.streams == capture.streams
    assert again.ranks == [0, 1]
    assert any("updater" in what for what in losses(capture))


def test_an_export_as_sqlite_and_back(tmp_path: Path) -> None:
    capture = read_capture(three_steps_and_two_replays().write(tmp_path / "a.sqlite"))
    write_sqlite(capture, tmp_path / "b.sqlite")
    again = read_capture(tmp_path / "b.sqlite")
    _same(again, capture)
    assert _rows(again, "nodes") == _rows(capture, "nodes")
    assert _rows(again, "gpu") == _rows(capture, "gpu")  # its processes are global numbers already
    assert again.rank_source == capture.rank_source == "counted"


def test_a_profilers_trace_as_sqlite_and_back(tmp_path: Path) -> None:
    capture = read_capture(expert_parallel().write(tmp_path / "t.json"))
    write_sqlite(capture, tmp_path / "t.sqlite")
    operators = int((capture.ranges["kind"] == c.OPERATOR).sum())
    assert f"{operators} operators of a framework become ranges" in losses(capture)
    again = read_capture(tmp_path / "t.sqlite")
    _same(again, capture, "kind", "name")
    write_chrome(again, tmp_path / "u.json", packed=False)
    _same(read_capture(tmp_path / "u.json"), replace(capture, gpu=located(capture, load_role_table()).gpu), "name")


def test_the_same_capture_gives_the_same_bytes(tmp_path: Path) -> None:
    capture = read_capture(ROOT / "traces" / "good" / "two_ranks_gathered")
    one = capture.with_tables({n: t[t["rank"] == 0] for n, t in capture.tables().items() if "rank" in t.dtype.names})
    for name in ("a", "b"):
        write_sqlite(capture, tmp_path / f"{name}.sqlite")
        write_chrome(one, tmp_path / f"{name}.json.gz", packed=True)
    assert (tmp_path / "a.sqlite").read_bytes() == (tmp_path / "b.sqlite").read_bytes()
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_merged_ranks_stay_apart(tmp_path: Path) -> None:
    capture = read_capture(ROOT / "traces" / "good" / "two_ranks_gathered")
    parts = [
        replace(capture, source=str(rank)).with_tables(
            {n: t[t["rank"] == rank] for n, t in capture.tables().items() if "rank" in t.dtype.names}
        )
        for rank in (0, 1)
    ]
    write_sqlite(merge(parts, [0, 0]), tmp_path / "t.sqlite")
    again = read_capture(tmp_path / "t.sqlite")
    assert again.ranks == [0, 1]
    assert len(np.unique(again.gpu["process"])) == 2


def test_chrome_holds_one_rank(tmp_path: Path) -> None:
    capture = read_capture(ROOT / "traces" / "good" / "two_ranks_gathered")
    with pytest.raises(UsageError, match="holds one rank"):
        write_chrome(capture, tmp_path / "t.json", packed=False)
    assert not (tmp_path / "t.json").exists()


def test_every_loss_of_chrome_is_named(tmp_path: Path) -> None:
    capture = read_capture(three_steps_and_two_replays().write(tmp_path / "a.sqlite"))
    text = "; ".join(chrome_losses(replace(capture, notes=("x",), streams={(0, 0, 7): "Main"})))
    for what in ("payload", "NVTX domains", "graph nodes", "streams", "notes"):
        assert what in text


def test_what_is_missing_stays_said(tmp_path: Path) -> None:
    """A converted trace must not look complete when the one it comes from was not."""
    capture = replace(read_capture(three_steps_and_two_replays().write(tmp_path / "a.sqlite")), incomplete="a hole")
    write_sqlite(capture, tmp_path / "t.sqlite")
    write_chrome(capture, tmp_path / "t.json", packed=False)
    assert "a hole" in read_capture(tmp_path / "t.sqlite").incomplete
    assert read_capture(tmp_path / "t.json").incomplete == "a hole"


@pytest.mark.parametrize("role", [-2, 11, 254, 10**6])
def test_a_role_that_does_not_exist_is_damage(tmp_path: Path, role: int) -> None:
    from moe_eplb.core.errors import TraceError

    event = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 1}
    event["args"] = {"stream": 7, "device": 0, "eplb role": role}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [event]}))
    with pytest.raises(TraceError) as caught:
        read_capture(tmp_path / "t.json")
    assert caught.value.code == "E062"
