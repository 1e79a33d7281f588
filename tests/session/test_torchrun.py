"""Ranks that torchrun started come to the same verdict and placements as those that the program starts itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.run_folder import RunFolder
from moe_eplb.core.errors import ExitCode
from moe_eplb.core.verdict import Status, Verdict

ROOT = Path(__file__).parents[2]
RANKS = 4
SCENARIO = f"""\
ranks: {RANKS}
iterations: 6
timeout_s: 60
model: {{layers: 3, experts: 16, top_k: 2, hidden: 16, intermediate: 16}}
workload: {{kind: zipf, tokens_per_rank: 16, drift_every: 2}}
balancer: {{num_slots: 24, layer_updates_per_iter: 3, empty_group: never, update_timeout_s: 20}}
"""
LIMIT_S = 90


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "joined.yaml"
    path.write_text(SCENARIO, encoding="utf-8")
    return path


def ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python module to its end; past the limit its whole process group is killed, ranks included."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=os.environ | {"PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(ranks: int, scenario: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # --standalone finds a free port, so that runs side by side do not meet.
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return ended([*launcher, "-m", "eplbctl", "run", str(scenario), "--out", str(folder), *options])


def slots_by_place(folder: RunFolder) -> dict[tuple[int, int], list[list[int]]]:
    """The slots of all ranks by iteration and layer."""
    return {
        (place.iteration, place.layer): [rows[rank]["slots"] for rank in sorted(rows)]
        for place, rows in folder.placements.items()
    }


def judged(folder: Path) -> Verdict:
    """The verdict that the run itself wrote."""
    return Verdict.from_json(json.loads((folder / "verdict.json").read_text(encoding="utf-8")))


def test_torchruns_ranks_do_what_spawned_ranks_do(scenario: Path, tmp_path: Path) -> None:
    joined, spawned = tmp_path / "joined", tmp_path / "spawned"
    by_torchrun = torchrun(RANKS, scenario, joined)
    assert by_torchrun.returncode == ExitCode.VALID, by_torchrun.stderr
    by_itself = ended(["eplbctl", "run", str(scenario), "--out", str(spawned)])
    assert by_itself.returncode == ExitCode.VALID, by_itself.stderr

    assert judged(joined).status is Status.VALID
    assert judged(joined).checks == judged(spawned).checks
    first, second = run_folder.load(joined), run_folder.load(spawned)
    assert (first.meta["launcher"], second.meta["launcher"]) == ("torchrun", "spawn")
    placements = slots_by_place(first)
    assert len(placements) == 6 * 3
    assert placements[0, 0] != placements[5, 0], "experts moved, so placements had a chance to differ"
    assert placements == slots_by_place(second)


def test_the_same_ranks_run_one_scenario_after_another(scenario: Path, tmp_path: Path) -> None:
    done = torchrun(2, scenario, tmp_path / "runs", "--ranks", "2", "--repeat", "3")
    assert done.returncode == ExitCode.VALID, done.stderr
    assert [judged(folder).status for folder in (tmp_path / "runs").iterdir()] == [Status.VALID] * 3


def test_a_wrong_number_of_ranks_is_refused_before_anything_is_written(scenario: Path, tmp_path: Path) -> None:
    done = torchrun(2, scenario, tmp_path / "run")
    assert done.returncode != ExitCode.VALID
    assert "error[E012]: torchrun and the scenario disagree about the ranks" in done.stderr
    assert "why: torchrun 2, scenario 4" in done.stderr
    assert f"exitcode  : {ExitCode.USAGE.value} " in done.stderr, "torchrun tells how its ranks ended"
    assert not (tmp_path / "run").exists()
