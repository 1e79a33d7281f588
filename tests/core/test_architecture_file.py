"""A checkpoint's configuration as the model section of a scenario."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_eplb.core import scenario
from moe_eplb.core.errors import ScenarioError
from tests.core.test_architecture import DEEPSEEK

HEAD = "ranks: 1\niterations: 2\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scenario's folder with a checkpoint's configuration in it: three MoE layers."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(DEEPSEEK))
    return tmp_path


def _load(folder: Path, model: str) -> scenario.Scenario:
    return scenario.loads(f"{HEAD}model: {{hf: hf, part: blocks, {model}}}\n", str(folder / "some.yaml"))


def test_sizes_come_from_the_configuration(folder: Path) -> None:
    model = _load(folder, "").model
    assert (model.layers, model.experts, model.top_k, model.hidden, model.intermediate) == (3, 8, 2, 32, 16)
    assert (model.shared_intermediate, model.routing.method, model.routing.scale) == (32, "deepseek_v3", 2.5)


def test_blocks_may_be_fewer_than_the_checkpoint_has(folder: Path) -> None:
    assert _load(folder, "layers: 2").model.layers == 2
    assert _load(folder, "layers: 3").model.layers == 3


def test_blocks_may_not_be_more_than_the_checkpoint_has(folder: Path) -> None:
    with pytest.raises(ScenarioError, match=r"E032(.|\n)*model\.layers(.|\n)*4 here, 3 in config\.json") as caught:
        _load(folder, "layers: 4")
    assert "some.yaml:3:" in caught.value.where


def test_a_whole_model_has_all_layers(folder: Path) -> None:
    with pytest.raises(ScenarioError, match=r"E032(.|\n)*2 here, 3 in config\.json"):
        scenario.loads(f"{HEAD}model: {{hf: hf, layers: 2}}\n", str(folder / "some.yaml"))


@pytest.mark.parametrize("layers", ["many", "2.5", "[4]", "true"])
def test_a_number_of_layers_that_is_none_is_a_bad_value(folder: Path, layers: str) -> None:
    with pytest.raises(ScenarioError, match=r"E031(.|\n)*layers"):
        _load(folder, f"layers: {layers}")


def test_sizes_that_differ_from_the_checkpoints(folder: Path) -> None:
    with pytest.raises(ScenarioError, match=r"E032(.|\n)*model\.experts(.|\n)*16 here, 8 in config\.json"):
        _load(folder, "experts: 16")
