"""On real expert choices the online placements come close to those made with hindsight, and every proof holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_loads import Comparison, compare, run
from moe_eplb.analysis.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
LOADS = ROOT.parent / "shared" / "data" / "expert_loads" / "gptoss20b_tokens_a.npz"
# The sequences begin alike: their first tokens all choose the same few experts, whose loads no earlier iteration
# announces. Fewer iterations than these would measure that beginning alone.
ITERATIONS = 18

pytestmark = [
    pytest.mark.skipif(not LOADS.is_file(), reason=f"the recorded choices of a real model are not here: {LOADS.name}"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    """A static and an online run, both of them with all checks valid."""
    return run(LOADS, ITERATIONS, tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def compared(runs: tuple[RunFolder, RunFolder]) -> Comparison:
    return compare(*runs)


def test_the_setting_is_the_models_own(runs: tuple[RunFolder, RunFolder]) -> None:
    model, slots = runs[1].scenario.model, runs[1].scenario.slots
    assert (model.layers, model.experts, model.top_k, slots) == (24, 32, 4, 40)


def test_online_comes_close_to_hindsight(compared: Comparison) -> None:
    assert sorted(compared.iterations) == list(range(1, ITERATIONS))
    assert compared.total.ratio >= 0.92
    assert compared.total.online <= compared.total.offline


def test_online_beats_a_placement_that_never_changes(compared: Comparison) -> None:
    assert compared.total.online > compared.total.static


def test_experts_really_moved(compared: Comparison) -> None:
    for layer, figures in enumerate(compared.layers):
        assert figures.slots_changed >= 0.1, layer
        assert figures.replicas_changed >= 0.1, layer
