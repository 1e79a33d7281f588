"""Every shipped scenario that fits the GPUs of this machine is valid on them, and moves experts as on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_eplb.analysis import reproduction, run_folder
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool, RunResult

GPUS = torch.cuda.device_count()
FOLDER = Path(__file__).parents[2] / "scenarios"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if "data" not in path.parts)
FITTING = [path for path in FILES if scenarios.load(path).ranks <= GPUS]

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        ranks.reserve(max(scenarios.load(path).ranks for path in FITTING))
        yield ranks


def _run(pool: RankPool, scenario: Scenario, folder: Path) -> RunResult:
    result = pool.run(scenario, folder)
    assert result.verdict.failure == ""
    assert {check.name: check.detail for check in result.verdict.checks if check.status is not Status.VALID} == {}
    return result


@pytest.mark.parametrize("path", FITTING, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_valid_on_gpus_with_the_placements_of_the_cpu(path: Path, pool: RankPool, tmp_path: Path) -> None:
    fast = _run(pool, scenarios.load(path, ["device=cuda", "timeout_s=120"]), tmp_path / "cuda")
    scenario = scenarios.load(path)
    if scenario.calls is not None or scenario.workload.kind == "model":
        return  # a router computes otherwise on a GPU, in the last bit, and near ties fall either way
    slow = _run(pool, scenario, tmp_path / "cpu")
    compared = reproduction.compare_placements(run_folder.load(fast.folder), run_folder.load(slow.folder))
    assert compared.places == scenario.iterations * scenario.model.layers
    assert compared.first_difference is None
