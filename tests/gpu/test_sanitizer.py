"""Torch's CUDA sanitizer finds no race in a run, and a planted one; memcheck finds a planted store out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(200)]

ROOT = Path(__file__).parents[2]
PLANTED = ROOT / "tests" / "session" / "planted"
TEXT = """\
name: watched
ranks: 1
iterations: 6
timeout_s: 90
device: cuda
model: {layers: 3, experts: 16, top_k: 2, hidden: 64, intermediate: 64, dtype: bfloat16}
workload: {kind: zipf, tokens_per_rank: 64, drift_every: 2}
"""
BALANCER = "balancer: {num_slots: 22, layer_updates_per_iter: 3, empty_group: never, alone: true, state: STATE}\n"
FP8 = TEXT.replace("bfloat16", "float8_e4m3fn").replace(
    "hidden: 64, intermediate: 64", "hidden: 128, intermediate: 128"
)
CHUNKED = TEXT.replace("64, drift", "[64], drift") + "moe_max_num_tokens: 24\n"
SCENARIOS = {
    "state_on_host": TEXT + BALANCER.replace("STATE", "host"),
    "state_on_device": TEXT + BALANCER.replace("STATE", "device") + "dispatch: allgather\n",
    "one_reduction": TEXT
    + BALANCER.replace("STATE", "device, reduction: iteration, commit_delay: 2")
    + "dispatch: allgather\n",
    "gathered": TEXT + BALANCER.replace("STATE", "device") + "dispatch: alltoall\n",
    "chunked": CHUNKED + BALANCER.replace("STATE", "device"),
    "fp8": FP8 + BALANCER.replace("STATE", "device"),
    "older": TEXT + BALANCER.replace("STATE", "device") + "dispatch: allgather\noverlap: before\n",
}
RACE = "CSAN detected a possible data race"


def watched(name: str, folder: Path, bug: str | None = None) -> tuple[int, str]:
    """Exit code of a run whose ranks are under the sanitizer, and all that it printed."""
    (folder / "watched.yaml").write_text(SCENARIOS[name])
    environment = os.environ | {"TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": _path(PLANTED, ROOT)}
    if bug is not None:
        environment["PLANTED_BUG"] = bug
    command = [sys.executable, "-m", "eplbctl", "run", "watched.yaml", "--out", "run"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _path(*first: Path) -> str:
    return os.pathsep.join([*map(str, first), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_a_run_has_no_race(name: str, tmp_path: Path) -> None:
    code, printed = watched(name, tmp_path)
    assert RACE not in printed, printed[-6000:]
    assert code == 0, printed[-6000:]


def test_a_planted_missing_join_is_found(tmp_path: Path) -> None:
    # With the state on the host the tables come from there, in a copy that the host waits for: there is no race.
    code, printed = watched("state_on_device", tmp_path, "missing_stream_join")
    assert RACE in printed, printed[-6000:]
    race = printed[printed.index(RACE) :]
    assert "_route\nreading from" in race, race[:6000]
    assert "_take_over\nwriting to" in race, race[:6000]
    assert code == 4, "the run fails where it is found"


# -- memcheck --------------------------------------------------------------------------------------------------------

STORES = """\
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def store(memory, size):
    at = tl.arange(0, 32)
    tl.store(memory + at, at, mask=at < size)


memory = torch.zeros(16, dtype=torch.int32, device="cuda")
store[(1,)](memory, int(sys.argv[1]), num_warps=1)
torch.cuda.synchronize()
print(memory.sum().item())
"""
FOUND = 9


def _memcheck() -> str | None:
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


@pytest.mark.skipif(_memcheck() is None, reason="compute-sanitizer, of the CUDA toolkit, is not installed")
@pytest.mark.parametrize(("size", "wanted"), [(16, 0), (17, FOUND)], ids=["inside", "one_too_many"])
def test_memcheck_finds_a_store_out_of_bounds(size: int, wanted: int, tmp_path: Path) -> None:
    (tmp_path / "stores.py").write_text(STORES)
    command = [
        str(_memcheck()), "--tool", "memcheck", "--error-exitcode", str(FOUND), sys.executable, "stores.py", str(size)
    ]  # fmt: skip
    # Else allocations lie in one block of the driver's, and what is beyond one of them is another's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    printed = done.stdout + done.stderr
    assert done.returncode == wanted, printed[-6000:]
    assert ("Invalid __global__ write" in printed) == bool(wanted), printed[-6000:]
