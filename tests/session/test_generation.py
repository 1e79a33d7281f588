"""A whole model is held against what its original says after the same text, by greedy choice alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.events import NullSink
from moe_eplb.core.scenario_parts import Checks
from moe_eplb.device import get_device
from moe_eplb.integrations.transformers import load_model
from moe_eplb.session.generation import GeneratingModel, _Candidates
from moe_eplb.session.groups import Groups

ROOT = Path(__file__).parents[2]
TINY = ROOT / "scenarios" / "data" / "tiny_mixtral"
SCENARIO = """\
name: generation
ranks: 2
iterations: 8
model: {hf: model, part: whole}
workload: {kind: model, steps: generate, tokens_per_rank: 2, prompt_tokens: 6}
balancer: {num_slots: 12, layer_updates_per_iter: 3, empty_group: never}
"""


def test_gaps_are_in_parts_of_the_largest_logit() -> None:
    candidates = _Candidates.of(torch.tensor([[1.0, 4.0, 3.0], [2.0, 2.0, -8.0]]).to(torch.bfloat16))
    assert candidates.gaps(torch.tensor([1, 0])) == [0.0, 0.0]
    assert candidates.gaps(torch.tensor([2, 2])) == [0.25, 1.25]


def test_a_token_far_behind_has_no_gap() -> None:
    logits = torch.arange(40.0).unsqueeze(0)
    assert _Candidates.of(logits).gaps(torch.tensor([0])) == [None]
    assert _Candidates.of(logits).gaps(torch.tensor([39])) == [0.0]


def _run(folder: Path) -> dict[str, Any]:
    (folder / "scenario.yaml").write_text(SCENARIO)
    command = [sys.executable, "-m", "eplbctl", "run", "scenario.yaml", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (folder / "run" / "verdict.json").exists(), done.stderr
    verdict: dict[str, Any] = json.loads((folder / "run" / "verdict.json").read_text())
    return verdict


@pytest.mark.timeout(120)
def test_a_model_that_asks_for_penalties_and_samples_is_compared_by_greedy_choice(tmp_path: Path) -> None:
    model = load_model(TINY, seed=3, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    wishes = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.9, "num_beams": 2, "eos_token_id": 5}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(wishes))
    verdict = _run(tmp_path)
    assert verdict["status"] == "valid", [check for check in verdict["checks"] if check["status"] != "valid"]
    lines = (tmp_path / "run" / "evidence.rank1.jsonl").read_text().splitlines()
    (row,) = [json.loads(line) for line in lines if '"row":"generated"' in line]
    assert row["gaps"] == [[0.0] * 8] * 2


def test_each_next_token_continues_the_text_of_the_original(tmp_path: Path) -> None:
    """One that is chosen otherwise is the only one that differs, as if the original had said the other, too."""
    (tmp_path / "scenario.yaml").write_text(
        SCENARIO.replace("ranks: 2", "ranks: 1").replace("hf: model", f"hf: {TINY}").partition("balancer")[0]
    )
    scenario, alone = scenarios.load(tmp_path / "scenario.yaml"), Groups(None, None, None, None)
    with torch.inference_mode():
        device = get_device("cpu", NullSink())
        model = GeneratingModel(scenario, 0, device, alone)
        assert model._expected is not None
        model._expected[:, 3] = (model._expected[:, 3] + 1) % 128
        said = [model.load(iteration)() for iteration in range(5)]
        free = GeneratingModel(scenario.model_copy(update={"checks": Checks(generation=False)}), 0, device, alone)
        text = [free.load(iteration)() for iteration in range(5)]
    assert torch.equal(torch.stack(said[:4]), torch.stack(text[:4]))
    assert torch.equal(model._next[:, 0], model._expected[:, 4])
    assert torch.equal(free._next[:, 0], text[4])
    assert not torch.equal(said[4], text[4]), "another text goes on otherwise"
