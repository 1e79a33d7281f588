"""A run that is told to end leaves no process, no shared memory and no temporary file, and says how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = """\
ranks: 2
iterations: 100000
timeout_s: 100
model: {layers: 2, experts: 16, top_k: 2, hidden: 16, intermediate: 16}
workload: {kind: zipf, tokens_per_rank: 16}
balancer: {num_slots: 24, layer_updates_per_iter: 2, empty_group: never}
record: {loads: false}
"""


def session_members(leader: int) -> list[int]:
    """Living processes of a session."""
    lines = subprocess.run(["ps", "-eo", "pid,sid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in lines.splitlines()[1:]]
    return [int(pid) for pid, sid, stat in rows if int(sid) == leader and "Z" not in stat]


def segments_of(pids: list[int]) -> list[str]:
    return [name for name in os.listdir("/dev/shm") for pid in pids if f"-{pid}-" in name]


@pytest.mark.parametrize("whole_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_run_that_is_told_to_end_leaves_nothing(
    sent: signal.Signals, code: int, whole_group: bool, tmp_path: Path
) -> None:
    scenario, temporary = tmp_path / "long.yaml", tmp_path / "tmp"
    scenario.write_text(LONG)
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(scenario), str(tmp_path / "run")], cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        assert run.stdout.readline() == "the ranks are at work\n"
        members = session_members(run.pid)
        assert len(members) >= 3
        assert segments_of(members)
        (os.killpg if whole_group else os.kill)(run.pid, sent)
        _, errors = run.communicate(timeout=30)
        assert run.returncode == code, errors
    assert "Traceback" not in errors
    assert segments_of(members) == []
    assert list(temporary.iterdir()) == []
    # The server that forks the ranks ends by itself when it sees that its client has.
    deadline = time.monotonic() + 10
    while session_members(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session_members(run.pid) == []


PROGRAM = """
import sys
import eplbctl.progress
from eplbctl.cli import main

class Progress(eplbctl.progress.Progress):
    def __call__(self, done, total):
        if done == 3:
            print("the ranks are at work", flush=True)

eplbctl.progress.Progress = Progress
sys.argv = ["eplbctl", "run", sys.argv[1], "--out", sys.argv[2]]
main()
"""
