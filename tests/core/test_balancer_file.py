from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Balancer, Scenario

FILE = """\
num_slots: 6
layer_updates_per_iter: 1
initial_global_assignments:
  7: [0, 1, 2, 3, 0, 1]
  3: [3, 2, 1, 0, 3, 2]
"""


def load(folder: Path, *, file: str = FILE, balancer: str = "{config: eplb.yaml}", ranks: int = 2) -> Scenario:
    (folder / "eplb.yaml").write_text(file)
    text = f"ranks: {ranks}\niterations: 8\nmodel: {{layers: 2, experts: 4, top_k: 1}}\nbalancer: {balancer}\n"
    (folder / "s.yaml").write_text(text)
    return scenarios.load(folder / "s.yaml")


def test_a_balancer_file_becomes_part_of_the_scenario(tmp_path: Path) -> None:
    scenario = load(tmp_path, balancer="{config: eplb.yaml, commit_delay: 2}")
    assert scenario.balancer == Balancer(
        num_slots=6, layer_updates_per_iter=1, commit_delay=2,
        initial_global_assignments={0: (3, 2, 1, 0, 3, 2), 1: (0, 1, 2, 3, 0, 1)},
    )  # fmt: skip


def test_a_dump_does_not_need_the_file(tmp_path: Path) -> None:
    scenario = load(tmp_path)
    text = scenarios.dump(scenario)
    (tmp_path / "eplb.yaml").unlink()
    assert scenarios.loads(text, "x") == scenario


@pytest.mark.parametrize("key", ["num_slots: 6", "slots_per_rank: 3", "layer_updates_per_iter: 2"])
def test_what_the_file_gives_may_not_be_given_again(tmp_path: Path, key: str) -> None:
    with pytest.raises(ScenarioError, match="given here and by 'config'") as caught:
        load(tmp_path, balancer=f"{{{key}, config: eplb.yaml}}")
    assert (caught.value.code, caught.value.where) == ("E032", f"{tmp_path / 's.yaml'}:4:12")


def test_a_file_for_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="ep_size 3 in the file, ranks 2 in the scenario"):
        load(tmp_path, file="ep_size: 3\nnum_slots: 6\n")


def test_a_file_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="7 slots cannot be shared out evenly"):
        load(tmp_path, file="num_slots: 7\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError) as caught:
        load(tmp_path, balancer="{config: nowhere.yaml}")
    assert caught.value.code == "E020"
    assert str(tmp_path / "nowhere.yaml") in str(caught.value)
