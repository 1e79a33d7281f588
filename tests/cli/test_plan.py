"""``eplbctl plan`` and ``eplbctl replay``: recorded loads in, placements and predictions out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_eplb.planning.formats.placements import read_placement
from moe_eplb.planning.formats.registry import PLACEMENTS as FORMS

from .conftest import Call

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Windows of a skewed load that scatters."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(400 * np.exp(rng.normal(0, 1, (1, 3, 16))), (6, 3, 16))
    path = tmp_path / "loads.npz"
    np.savez(path, counts=counts, layer_ids=[1, 2, 4])
    return path


SIZE = ("--ranks", "4", "--slots", "24")


def test_policies_side_by_side(call: Call, loads: Path) -> None:
    answer = call("plan", str(loads), *SIZE, "--policy", "static,greedy,refine")
    assert answer.code == 0, answer.err
    for part in ("static", "greedy", "refine", "above bound", "Least balanced layers of refine", "Imbalance by layer"):
        assert part in answer.out
    plans = json.loads(call("plan", str(loads), *SIZE, "--policy", "static,greedy,refine", "--format", "json").out)
    static, greedy, refine = plans["plans"]
    assert static["balancedness"] < greedy["balancedness"] <= refine["balancedness"] <= 1
    assert refine["gap"] >= 0
    assert plans["layer_ids"] == [1, 2, 4]


def test_decode_steps_are_scored_by_what_they_read(call: Call, loads: Path) -> None:
    asked = ("plan", str(loads), *SIZE, "--decode-pairs", "64")
    text = call(*asked).out
    plans = json.loads(call(*asked, "--format", "json").out)["plans"]
    assert "A decode step of 64 routed pairs" in text
    for plan in plans:
        assert 0 < plan["decode"]["touched"] <= 6
        assert f"{plan['decode']['read_us']:,.1f}" in text
    assert "decode step" not in call("plan", str(loads), *SIZE).out


@pytest.mark.parametrize("form", sorted(FORMS))
def test_placements_in_every_form(call: Call, loads: Path, form: str) -> None:
    answer = call("plan", str(loads), *SIZE, "-o", "p", "--to", form)
    assert answer.code == 0, answer.err
    assert ("not in p" in answer.err) == (form != "json")
    placement = read_placement(Path("p"), ranks=4, experts=16)
    assert placement.slots.shape[1] == 24
    again = call("plan", str(loads), *SIZE, "--current", "p", "--policy", "static", "--format", "json")
    (plan,) = json.loads(again.out)["plans"]
    assert plan["moved"] == 0
    assert plan["before"] == plan["balancedness"]


def test_a_written_placement_is_what_a_scenario_takes(call: Call, loads: Path) -> None:
    call("plan", str(loads), *SIZE, "-o", "eplb.yaml", "--to", "tensorrt_llm")
    Path("s.yaml").write_text(
        "ranks: 4\nmodel: {layers: 3, experts: 16, top_k: 2}\nbalancer: {config: eplb.yaml}\n"
        "description: takes what plan wrote\n"
    )
    answer = call("scenario", "check", "s.yaml")
    assert answer.code == 0, answer.err


def test_few_moves_from_what_is_there_and_a_gate(call: Call, loads: Path) -> None:
    call("plan", str(loads), *SIZE, "--policy", "static", "-o", "now.json")
    budget = ("--current", "now.json", "--policy", "incremental", "--max-moves", "10", "--format", "json")
    (plan,) = json.loads(call("plan", str(loads), *SIZE, *budget).out)["plans"]
    assert 0 < plan["moved"] <= 0.1 * 72
    assert plan["balancedness"] > plan["before"]
    assert call("plan", str(loads), *SIZE, *budget, "--min-gain", "1").code == 0
    refused = call("plan", str(loads), *SIZE, "--current", "now.json", "--policy", "incremental", "--min-gain", "500")
    assert refused.code == 1
    assert "does not pay" in refused.out


def test_replayed(call: Call, loads: Path) -> None:
    answer = call("replay", str(loads), *SIZE)
    assert answer.code == 0, answer.err
    assert "Least predicted time" in answer.out
    assert "replay: window" in answer.err
    found = json.loads(
        call("replay", str(loads), *SIZE, "--policy", "static,incremental", "--search", "--format", "json").out
    )
    assert len(found["settings"]) > 3
    for one in found["settings"]:
        assert len(one["next_window"]) == 5
    assert found["why"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("plan", "nowhere.npz", *SIZE), "E040"),
        (("plan", "{loads}", "--ranks", "4"), "--slots"),
        (("plan", "{loads}", "--ranks", "5", "--slots", "24"), "use 25 slots"),
        (("plan", "{loads}", "--ranks", "4", "--slots", "8"), "do not fit"),
        (("plan", "{loads}", *SIZE, "--policy", "best"), "E191"),
        (("plan", "{loads}", *SIZE, "--policy", "incremental"), "E191"),
        (("plan", "{loads}", *SIZE, "--policy", ","), "E191"),
        (("plan", "{loads}", *SIZE, "--current", "{loads}"), "E0"),
        (("plan", "{loads}", *SIZE, "-o", "taken"), "E002"),
        (("plan", "{loads}", *SIZE, "--to", "yaml"), "--to"),
        (("replay", "{loads}", *SIZE, "--policy", "x"), "E191"),
        (("replay", "one.npz", *SIZE), "E194"),
        (("replay", "{loads}", *SIZE, "--hidden", "2"), "--hidden"),
    ],
)
def test_wrong_input(call: Call, loads: Path, arguments: tuple[str, ...], what: str) -> None:
    Path("taken").write_text("mine")
    np.savez("one.npz", counts=np.ones((1, 2, 16), int))
    answer = call(*(word.format(loads=loads) for word in arguments))
    assert (answer.code, answer.out) == (2, ""), answer.err
    assert what in answer.err
    assert "Traceback" not in answer.err
    assert Path("taken").read_text() == "mine"


def test_planning_needs_no_torch(loads: Path) -> None:
    program = (
        "import sys\nfrom eplbctl.cli import invoke\n"
        f"code = invoke(['plan', {str(loads)!r}, '--ranks', '4', '--slots', '24'])\n"
        "print(sorted({'torch', 'pydantic', 'scipy.optimize', 'pandas'} & set(sys.modules)))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
