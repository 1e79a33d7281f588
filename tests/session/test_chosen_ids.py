"""A run can be told to choose what another one's routers have chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.analysis import reproduction, run_folder
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool

FOLDER = Path(__file__).parents[2] / "scenarios"


@pytest.mark.parametrize("name", ["routing_default", "models/qwen2_moe_blocks"])
def test_the_ids_of_a_run_replayed_give_its_placements(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.yaml"
    routed = scenarios.load(path, ["record.topk_ids=true"])
    with RankPool() as pool:
        first = pool.run(routed, tmp_path / "first")
        chosen = ["workload.kind=recorded", f"workload.path={first.folder / 'topk_ids.npz'}"]
        chosen += [] if routed.model.hf else ["model.routing={}"]  # a router that has no say
        second = pool.run(scenarios.load(path, chosen), tmp_path / "second")
    assert [first.verdict.status, second.verdict.status] == [Status.VALID] * 2
    compared = reproduction.compare_placements(*(run_folder.load(one.folder) for one in (first, second)))
    assert compared.places == routed.iterations * routed.model.layers
    assert compared.first_difference is None
