"""The whole program on real ranks: run, report, verify, reproduce."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .conftest import Call, Write

ROOT = Path(__file__).parents[2]


def test_a_run_is_reported_judged_and_reproduced(call: Call, write: Write) -> None:
    ran = call("run", write(), "--out", "one")
    assert ran.code == 0, ran.out
    assert "Balancedness" in ran.out
    reported = call("report", "one")
    assert reported.code == 0
    assert "First violation of the call order: none" in reported.out
    again = call("run", "one")
    assert again.code == 0
    assert "reproduced: all 8 placements" in again.out
    judged = call("verify", "one", "runs", "scenarios")
    assert judged.code == 0, judged.out
    assert judged.out.rstrip().endswith("3 valid")


def test_ranks_may_be_torchruns(write: Write) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "eplbctl", "run", str(write()), "--out", "one"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: one") == 1
    assert done.stdout.startswith("small: valid")
