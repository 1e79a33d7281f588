"""Exports of Nsight Systems: what stands in them is read, whatever columns this version has."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.ranges import Launches, Projection, project
from moe_eplb.analysis.readers.nsys import read_nsys
from moe_eplb.analysis.roles import prepare
from tests.analysis.nsys_files import PROCESS, THREAD, NsysFile, three_steps_and_two_replays

SAMPLE = os.environ.get("EPLB_NSYS_SAMPLE", "")
real_sample = pytest.mark.skipif(not SAMPLE, reason="EPLB_NSYS_SAMPLE names no export of a real capture")


def _sums(capture: Capture, replayed: bool | None = None) -> dict[str, tuple[int, int]]:
    """Total ns and number of kernels by name; of all of them, of those of graph replays, or of the others."""
    total, count = Counter[str](), Counter[str]()
    of_graph = capture.gpu["graph_node"] != c.UNKNOWN
    chosen = np.ones_like(of_graph) if replayed is None else of_graph == replayed
    for row in capture.gpu[chosen & (capture.gpu["kind"] == c.KERNEL)]:
        name = capture.names[row["name"]]
        total[name] += int(row["end"] - row["start"])
        count[name] += 1
    return {name: (total[name], count[name]) for name in total}


def test_kernel_sums_and_projections_of_a_small_sample(tmp_path: Path) -> None:
    capture = read_nsys(three_steps_and_two_replays().write(tmp_path / "s.sqlite"))
    assert _sums(capture) == {"gemm<1>": (600 + 1400, 5), "add<2>": (600, 3), "fill<3>": (600, 2)}
    assert _sums(capture, replayed=False) == {"gemm<1>": (600, 3), "add<2>": (600, 3)}
    assert _sums(capture, replayed=True) == {"gemm<1>": (1400, 2), "fill<3>": (600, 2)}
    assert {one.name: one for one in project(capture)} == {
        "eplb:eplb/step": Projection("eplb:eplb/step", 3, 6, 6, 1500, 1200),
        ":a": Projection(":a", 3, 6, 6, 1500, 1200),
        ":replay": Projection(":replay", 1, 2, 4, 2300, 2000),
    }
    assert capture.form == "nsys 3.20.3"


def test_replayed_kernels_lie_in_the_range_of_their_capture(tmp_path: Path) -> None:
    capture = read_nsys(three_steps_and_two_replays().write(tmp_path / "s.sqlite"))
    assert [(p.name, p.instances, p.events) for p in project(capture, at_capture=True)] == [(":capture layer 4", 1, 4)]
    replayed = capture.gpu["graph_node"] != c.UNKNOWN
    assert capture.nodes["start"][Launches(capture).node[replayed]].tolist() == [25_001, 25_002] * 2
    assert (Launches(capture).node[~replayed] == c.UNKNOWN).all()
    located = prepare(capture)
    assert located.gpu["layer"].tolist() == [-1] * 6 + [4] * 4
    assert located.gpu["iteration"].tolist() == [0, 0, 1, 1, 2, 2] + [-1] * 4


@real_sample
def test_the_figures_that_nsys_itself_printed() -> None:
    capture = read_nsys(Path(SAMPLE))
    found = {one.name: (one.span_ns, one.instances, one.launches) for one in project(capture)}
    assert found == {":a": (99016467, 3, 6), "eplb:eplb/step": (99016467, 3, 6), ":replay": (108480, 1, 2)}
    words = "xmma_gemm", "distribution", "CUDAFunctorOnSelf_add", "FillFunctor"

    def by_word(replayed: bool | None) -> dict[str, tuple[int, int]]:
        sums = _sums(capture, replayed)
        return {word: sums[name] for word in words for name in sums if word in name}

    eager, graph = by_word(replayed=False), by_word(replayed=True)
    assert {word: count for word, (_, count) in graph.items()} == {"xmma_gemm": 2, "CUDAFunctorOnSelf_add": 2}
    assert eager["xmma_gemm"][0] + graph["xmma_gemm"][0] == 254943
    assert by_word(None) == {
        "xmma_gemm": (254943, 5), "distribution": (15488, 3), "CUDAFunctorOnSelf_add": (4864, 2),
        "FillFunctor": (2080, 2),
    }  # fmt: skip


def test_names_domains_categories_and_payloads(tmp_path: Path) -> None:
    file = NsysFile()
    file.domain("mine", 3)
    file.add("NVTX_EVENTS", start=0, eventType=33, category=7, text="kinds", globalTid=THREAD, domainId=3)
    file.range("own", 10, 20, domainId=3, category=7, uint64Value=5)
    file.range(None, 30, None, textId=file.string("registered"), int64Value=-4)
    file.range(None, 40, 50, textId=999, eventType=60)
    file.range("mark", 60, None, eventType=34)
    capture = read_nsys(file.write(tmp_path / "s.sqlite"))
    texts = [capture.names[row] for row in capture.ranges["text"]]
    assert texts == ["own", "registered", "[name not in the trace]", "mark"]
    assert [capture.names[row] if row >= 0 else "" for row in capture.ranges["domain"]] == ["mine", "", "", ""]
    assert [capture.names[row] if row >= 0 else "" for row in capture.ranges["category"]] == ["kinds", "", "", ""]
    assert capture.ranges["payload"].tolist() == [5, -4, c.NO_PAYLOAD, c.NO_PAYLOAD]
    assert capture.ranges["end"].tolist() == [20, c.UNKNOWN, 50, 60]
    assert capture.ranges["kind"].tolist() == [c.PUSH_POP, c.PUSH_POP, c.START_END, c.MARK]


def test_copies_fills_streams_and_waits(tmp_path: Path) -> None:
    file = NsysFile()
    place = {"deviceId": 0, "streamId": 9, "globalPid": PROCESS}
    file.add("CUPTI_ACTIVITY_KIND_MEMCPY", start=0, end=5, correlationId=1, bytes=64, copyKind=10, **place)
    file.add("CUPTI_ACTIVITY_KIND_MEMSET", start=6, end=7, correlationId=2, bytes=8, **place)
    file.add("TARGET_INFO_NVTX_CUDA_STREAM", streamId=9, processId=801, name="MoeBalancer")
    file.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=1_795_397_297_233_041_759)
    sync = {"globalPid": PROCESS, "eventId": 4, "eventSyncId": 77}
    file.add("CUPTI_ACTIVITY_KIND_CUDA_EVENT", streamId=13, correlationId=30, **sync)
    file.add("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", start=8, end=9, streamId=9, correlationId=31, syncType=2, **sync)
    capture = read_nsys(file.write(tmp_path / "s.sqlite"))
    assert [capture.names[row] for row in capture.gpu["name"]] == ["Memcpy PtoP", "Memset"]
    assert capture.gpu["bytes"].tolist() == [64, 8]
    assert capture.streams == {(0, 0, 9): "MoeBalancer"}
    assert capture.utc == 1_795_397_297_233_041_759
    wait = capture.syncs[0]
    assert (wait["kind"], wait["on_stream"], wait["on_correlation"]) == (c.SYNC_WAIT, 13, 30)


def test_processes_are_ranks_that_they_state_or_that_are_counted(tmp_path: Path) -> None:
    def export(texts: tuple[str, str]) -> Capture:
        file = NsysFile()
        for number, text in enumerate(texts):
            process = PROCESS + ((1 - number) << 24)
            file.kernel("gemm", number, number + 1, 1, globalPid=process)
            file.range(text, 0, 1, thread=process + 1)
        return read_nsys(file.write(tmp_path / f"{texts[0]}.sqlite"))

    stated, counted = export(("rank=5", "rank=3")), export(("a", "b"))
    assert (stated.ranks, stated.rank_source, stated.notes) == ([3, 5], "stated", ())
    assert stated.gpu["start"][stated.gpu["rank"] == 5].tolist() == [0]
    assert (counted.ranks, counted.rank_source) == ([0, 1], "counted")
    assert counted.notes == ("2 processes are counted as ranks, by process number",)


def test_correlations_of_two_processes_are_kept_apart(tmp_path: Path) -> None:
    file = NsysFile()
    other = PROCESS + (1 << 24)
    file.call(100, 110, 1)
    file.call(500, 510, 1, thread=other + 1)
    file.kernel("gemm", 120, 130, 1)
    file.kernel("gemm", 520, 530, 1, globalPid=other)
    capture = read_nsys(file.write(tmp_path / "s.sqlite"))
    assert capture.calls["start"][Launches(capture).call].tolist() == [100, 500]


def test_dropped_data_is_said(tmp_path: Path) -> None:
    file = NsysFile()
    file.kernel("gemm", 0, 1, 1)
    file.add("DIAGNOSTIC_EVENT", timestamp=0, severity=2, text="CUDA profiling might have dropped some events.")
    file.add("DIAGNOSTIC_EVENT", timestamp=0, severity=1, text="Nothing was lost.")
    assert read_nsys(file.write(tmp_path / "s.sqlite")).incomplete == "CUDA profiling might have dropped some events."


def test_columns_that_a_version_lacks(tmp_path: Path) -> None:
    path = three_steps_and_two_replays().write(tmp_path / "s.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN graphNodeId")
        connection.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN demangledName")
        connection.execute("ALTER TABLE NVTX_EVENTS DROP COLUMN uint64Value")
        connection.execute("DROP TABLE CUDA_GRAPH_NODE_EVENTS")
        connection.commit()
    capture = read_nsys(path)
    assert (capture.gpu["graph_node"] == c.UNKNOWN).all()
    assert np.unique([capture.names[row] for row in capture.gpu["name"]]).tolist() == ["add", "fill", "gemm"]
