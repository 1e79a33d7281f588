"""Every shipped scenario is valid on this machine's GPUs, eager and in graphs, and moves experts as on a CPU.

Ranks beyond the number of GPUs share them, with collectives through host memory. Graphs cannot do that: there a
scenario with more ranks runs on one, with as many slots in all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_eplb.analysis import reproduction, run_folder
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.device.environment import CONNECTIONS
from moe_eplb.session import RankPool, RunResult

GPUS = torch.cuda.device_count()
FOLDER = Path(__file__).parents[2] / "scenarios"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if "data" not in path.parts)
MODES = ("eager", "resident", "graph")

pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")


def variant(path: Path, mode: str) -> list[str] | None:
    """What to change of a scenario so that it runs in that mode; None where the mode does not apply."""
    scenario, changes = scenarios.load(path), []
    moves = scenario.balancer is not None and scenario.balancer.layer_updates_per_iter > 0 and scenario.calls is None
    if mode != "eager":
        if not moves or scenario.model.backend != "wide_ep" or scenario.model.part == "whole":
            return None
        changes.append("balancer.state=device")
    if mode == "graph" and scenario.ranks > GPUS and scenario.balancer and scenario.balancer.policy != "reference":
        return None  # a single rank is balanced, so policies that avoid moves make none
    if mode != "graph":
        return [*changes, "share_gpus=true"] if scenario.ranks > GPUS else changes
    changes += ["execution=graph"] + ["model.dtype=bfloat16"] * (scenario.model.dtype == "float32")
    return changes if scenario.ranks <= GPUS else [*changes, "balancer.alone=true", "ranks=1", *_on_one_rank(scenario)]


def _on_one_rank(scenario: Scenario) -> list[str]:
    # Some slots more than experts, or nothing could ever move; and no balance that a single rank could reach or miss.
    slots = [f"balancer.slots_per_rank={scenario.slots + 3}", "balancer.num_slots=null", "checks.thresholds={}"]
    tokens = scenario.workload.tokens_per_rank
    return slots if isinstance(tokens, int) else [*slots, f"workload.tokens_per_rank={max(tokens)}"]


def cases() -> Iterator[object]:
    for mode in MODES:
        for path in FILES:
            changes = variant(path, mode)
            if changes is not None and _loads(path, ["device=cuda", "timeout_s=120", *changes]):
                yield pytest.param(path, changes, id=f"{mode}-{path.relative_to(FOLDER).with_suffix('')}")


def _loads(path: Path, changes: list[str]) -> bool:
    """Whether the changed scenario fits together: some are about ranks, or about what a graph cannot do."""
    try:
        scenarios.load(path, changes)
    except ScenarioError:
        return False
    return True


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    # Some ten processes that take as many channels of a GPU as they can use them up; beside other pools there are more.
    # Chunks in graphs over NCCL need more than 8, or plans come late: they pass without other workers.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 2:
        os.environ.setdefault(CONNECTIONS, str(max(8, 80 // workers)))
    with RankPool() as ranks:
        ranks.reserve(max(scenarios.load(path).ranks for path in FILES))
        yield ranks


def _run(pool: RankPool, scenario: Scenario, folder: Path) -> RunResult:
    result = pool.run(scenario, folder)
    assert not result.verdict.failure, result.verdict.failure  # the message is shown whole
    assert {check.name: check.detail for check in result.verdict.checks if check.status is not Status.VALID} == {}
    return result


@pytest.mark.parametrize(("path", "changes"), list(cases()))
def test_valid_on_gpus_with_the_placements_of_the_cpu(
    path: Path, changes: list[str], pool: RankPool, tmp_path: Path
) -> None:
    on_cpu = [change for change in changes if not change.startswith(("execution=", "share_gpus=", "balancer.state="))]
    scenario = scenarios.load(path, on_cpu)
    # A router computes otherwise on a GPU, in the last bit, and near ties fall either way.
    routed = scenario.workload.kind == "model" and scenario.model.part != "whole"
    recorded = ["record.topk_ids=true"] if routed else []
    fast = _run(pool, scenarios.load(path, ["device=cuda", "timeout_s=120", *changes, *recorded]), tmp_path / "cuda")
    if scenario.calls is not None or scenario.model.part == "whole":
        return  # a text is held against what transformers says, token by token
    chosen = ["workload.kind=recorded", f"workload.path={fast.folder / 'topk_ids.npz'}"] if routed else []
    chosen += ["model.routing={}"] if routed and scenario.model.hf is None else []  # a router that has no say
    slow = _run(pool, scenarios.load(path, [*on_cpu, *chosen]), tmp_path / "cpu")
    compared = reproduction.compare_placements(run_folder.load(fast.folder), run_folder.load(slow.folder))
    assert compared.places == scenario.iterations * scenario.model.layers
    assert compared.first_difference is None
