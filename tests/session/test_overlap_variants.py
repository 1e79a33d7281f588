"""Whatever the streams do, experts move alike; and what the older choreography cannot do is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.reproduction import compare_placements
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool

TEXT = """\
name: overlaps
ranks: 2
seed: 5
iterations: 8
model: {layers: 3, experts: 16, top_k: 2, hidden: 16, intermediate: 16}
dispatch: allgather
workload: {kind: zipf, tokens_per_rank: [24, 10], skew: 1.2, drift_every: 2}
balancer: {num_slots: 24, layer_updates_per_iter: 3, empty_group: never}
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        yield ranks


@pytest.mark.parametrize("changes", [[], ["balancer.state=device"], ["moe_max_num_tokens=6"]], ids=str)
def test_all_overlaps_move_experts_alike(changes: list[str], pool: RankPool, tmp_path: Path) -> None:
    folders = []
    for overlap in ("after", "before", "serial"):
        scenario = scenarios.loads(TEXT, "overlaps.yaml", [*changes, f"overlap={overlap}"])
        result = pool.run(scenario, tmp_path / overlap)
        found = {check.name: check.detail for check in result.verdict.checks if check.status is not Status.VALID}
        assert (found, result.verdict.failure) == ({}, "")
        folders.append(run_folder.load(result.folder))
    for other in folders[1:]:
        compared = compare_placements(folders[0], other)
        assert (compared.places, compared.first_difference) == (8 * 3, None)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        (["dispatch=alltoall"], "dispatch: allgather"),
        (["dispatch=alltoall", "statistics=gathered"], "dispatch: allgather"),
        (["statistics=local_ids"], "statistics: auto"),
    ],
)
def test_statistics_that_the_older_choreography_cannot_have_are_refused(changes: list[str], hint: str) -> None:
    with pytest.raises(ScenarioError, match="counts the ids of all ranks") as refused:
        scenarios.loads(TEXT, "overlaps.yaml", [*changes, "overlap=before"])
    assert hint in str(refused.value)
    scenarios.loads(TEXT, "overlaps.yaml", [*changes, "overlap=after"])
