"""``eplbctl shm``: what crashed runs left is seen and removed, what lives is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_eplb.balancer import host_memory

from .conftest import Call

DEAD_PID = 2**22 + 1
"""Larger than the largest process id of Linux."""


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /dev/shm with one living and one stale segment."""
    for function in (host_memory.list_segments, host_memory.clean_segments):
        assert function.__kwdefaults__ is not None
        monkeypatch.setitem(function.__kwdefaults__, "directory", tmp_path)
    _, memory = host_memory.create_segment("alive", "layer0", 4096, directory=tmp_path)
    memory.close()
    (tmp_path / f"moe_eplb-dead-{DEAD_PID}-7-layer0").write_bytes(bytes(8192))
    return tmp_path


def _names(folder: Path) -> set[str]:
    return {path.name.split("-")[1] for path in folder.iterdir()}


def test_list_tells_the_state(call: Call, segments: Path) -> None:
    answer = call("shm", "list")
    rows = {line.split()[0].split("-")[1]: line.split()[1:] for line in answer.out.splitlines()[2:]}
    assert rows["alive"] == ["4,096", str(os.getpid()), "in", "use"]
    assert rows["dead"] == ["8,192", str(DEAD_PID), "stale"]
    assert answer.err == "next: eplbctl shm clean\n"


def test_clean_spares_the_living(call: Call, segments: Path) -> None:
    assert call("shm", "clean").out == f"removed moe_eplb-dead-{DEAD_PID}-7-layer0 (8,192 bytes)\n"
    assert _names(segments) == {"alive"}
    assert call("shm", "clean").out == "nothing to remove\n"


def test_clean_all_spares_nobody(call: Call, segments: Path) -> None:
    assert len(call("shm", "clean", "--all").out.splitlines()) == 2
    assert _names(segments) == set()
    assert call("shm", "list").out == "no segments\n"
