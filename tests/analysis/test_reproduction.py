"""Two runs are the same when every placement of every rank is."""

from __future__ import annotations

from pathlib import Path

from moe_eplb.analysis.reproduction import Reproduction, compare_placements
from moe_eplb.analysis.run_folder import Evidence, Place, RunFolder
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.evidence import Row

SCENARIO = scenarios.loads("ranks: 2\nmodel: {layers: 2, experts: 4, top_k: 1}\n", "two.yaml")


def _folder(*placements: tuple[int, int, int, int]) -> RunFolder:
    """A run with placements given as (rank, layer, iteration, digest)."""
    rows = [
        {"row": Row.PLACEMENT.value, "rank": rank, "layer": layer, "iteration": iteration, "digest": digest}
        for rank, layer, iteration, digest in placements
    ]
    return RunFolder(Path("run"), SCENARIO, {}, Evidence(rows), None)


BASE = ((0, 0, 0, 7), (1, 0, 0, 7), (0, 1, 0, 8), (0, 0, 1, 9))


def test_the_same_digests_are_a_reproduction() -> None:
    assert compare_placements(_folder(*BASE), _folder(*reversed(BASE))) == Reproduction(3, None)


def test_the_first_difference_is_named_by_iteration_then_layer() -> None:
    other = _folder(BASE[0], BASE[1], (0, 1, 0, 5), (0, 0, 1, 5))
    assert compare_placements(_folder(*BASE), other) == Reproduction(3, Place(1, 0))


def test_a_difference_on_any_rank_counts() -> None:
    other = _folder(BASE[0], (1, 0, 0, 6), *BASE[2:])
    assert compare_placements(_folder(*BASE), other).first_difference == Place(0, 0)


def test_a_placement_that_one_run_lacks_is_a_difference() -> None:
    assert compare_placements(_folder(*BASE), _folder(*BASE[:-1])) == Reproduction(3, Place(0, 1))
    assert compare_placements(_folder(*BASE[:-1]), _folder(*BASE)) == Reproduction(3, Place(0, 1))


def test_runs_without_placements_compare_nothing() -> None:
    assert compare_placements(_folder(), _folder()) == Reproduction(0, None)
