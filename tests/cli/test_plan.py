"""``eplbctl plan`` and ``eplbctl replay``: recorded loads in, placements and predictions out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    held = ("--current", "now.json", "--policy", "incremental")
    refused = call("plan", str(loads), *SIZE, *held, "--min-gain", "500", "-o", "refused.json")
    assert refused.code == 1
    assert "does not pay" in refused.out
    assert "refused.json was not written" in refused.err
    assert not Path("refused.json").exists()


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Loads of five experts in two layers, whose optimum is soon proved."""
    path = tmp_path / "few.npz"
    np.savez(path, counts=[[[422, 3494, 265, 665, 741], [5, 1, 1, 1, 0]]])
    return path


SMALL = ("--ranks", "4", "--slots", "8", "--policy", "static,refine")


def test_the_proved_optimum_is_the_bound(call: Call, few: Path) -> None:
    answer = call("plan", str(few), *SMALL, "--exact", "20", "--format", "json")
    assert answer.code == 0, answer.err
    assert "optimum: layer 2 of 2" in answer.err
    for plan in json.loads(answer.out)["plans"]:  # and nothing that the solver prints
        assert plan["proved"] == 2
        for row in plan["layers"]:
            assert row["bounds"]["mean"] < row["bounds"]["optimum"] == row["bound"] <= row["largest"]
    assert "The optimum was proved in 2 of 2 layers." in call("plan", str(few), *SMALL, "--exact", "20").out
    assert "proved in 2 of 2" in call("plan", str(few), *SMALL, "--exact", "20", "--format", "html").out
    without = call("plan", str(few), *SMALL, "--format", "json").out
    assert json.loads(without)["plans"][0]["proved"] is None
    assert "The optimum" not in call("plan", str(few), *SMALL).out


def test_what_is_not_proved_is_said(call: Call, loads: Path) -> None:
    answer = call("plan", str(loads), *SIZE, "--exact", "0.05")
    assert answer.code == 0, answer.err
    assert "optimum: not proved in 3 layers, with 0.05 s for each" in answer.out


def test_exact_without_scipy(call: Call, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    answer = call("plan", str(few), *SMALL, "--exact", "1")
    assert (answer.code, answer.out) == (2, "")
    assert "E192" in answer.err
    assert "pip install 'moe-eplb[bound]'" in answer.err


def test_ranks_that_differ_or_hold_nothing(call: Call, loads: Path) -> None:
    arguments = ("--policy", "greedy,refine", "--rank-slots", "9,5,5,5", "--mask", "2", "--format", "json")
    answer = call("plan", str(loads), *SIZE, *arguments)
    assert answer.code == 0, answer.err
    for plan in json.loads(answer.out)["plans"]:
        for layer in plan["slot_experts"]:
            assert len(layer) == 24
            assert layer[14:19] == [-1] * 5, "slots of the masked rank"
            assert set(layer[:14] + layer[19:]) == set(range(16))
    plain = json.loads(call("plan", str(loads), *SIZE, "--format", "json").out)
    assert "slot_experts" not in plain["plans"][0], "files hold it"


def test_bounds_and_moves_are_told(call: Call, few: Path) -> None:
    call("plan", str(few), "--ranks", "4", "--slots", "8", "--policy", "static", "-o", "now.json")
    asked = ("plan", str(few), *SMALL, "--current", "now.json", "--nodes", "2")
    slow = ("--slot-mib", "100", "--bandwidth", "same_node=1, cross_node=2", "--us-per-token", "0.5")
    text = call(*asked, *slow).out
    for part in ("mean of the ranks", "largest replica", "GB from cross node", "A slot has 100 MiB", "cross node 2,"):
        assert part in text
    first, other = (json.loads(call(*asked, *extra, "--format", "json").out)["plans"][1] for extra in ((), slow))
    assert first["links"]["cross_node_gb_s"] == 25
    assert (other["links"]["same_node_gb_s"], other["links"]["cross_node_gb_s"]) == (1, 2)
    assert sum(other["bytes_by_link"].values()) == other["moved"] * 100 * 2**20
    assert other["migration_ms"] > 10 * first["migration_ms"]
    assert other["saved_us"] == pytest.approx(10 * first["saved_us"])


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


def test_replayed_with_a_least_gain(call: Call, loads: Path) -> None:
    asked = ("replay", str(loads), *SIZE, "--policy", "static,greedy,incremental")

    def settings(*more: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(call(*asked, *more, "--format", "json").out)["settings"]
        return found

    plain, low, high = settings(), settings("--min-gain", "5"), settings("--min-gain", "900")
    assert [one["min_gain"] for one in plain] == [0.0, 0.0, 0.0]
    assert [one["min_gain"] for one in low] == [0.0, 0.05, 0.05]
    for always, gated, never in zip(plain[1:], low[1:], high[1:], strict=True):
        assert always["moves"] > gated["moves"] > never["moves"] == 0
    assert "incremental every 1 from 8, only where a layer gains 5%" in call(*asked, "--min-gain", "5").out
    assert "only where" not in call(*asked).out
    searched = settings("--search", "--min-gain", "5")
    assert len(searched) == 2 * len(settings("--search")) - 1
    assert {one["min_gain"] for one in searched} == {0.0, 0.05}


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
        (("plan", "{loads}", *SIZE, "--mask", "4"), "a masked rank does not exist"),
        (("plan", "{loads}", *SIZE, "--mask", "-1"), "'-1' does not parse"),
        (("plan", "{loads}", *SIZE, "--rank-slots", "6,6"), "2 numbers with the sum 12"),
        (("plan", "{loads}", *SIZE, "--rank-slots", "6,,6"), "'6,,6' does not parse"),
        (("plan", "{loads}", *SIZE, "--mask", "3", "-o", "mine.json"), "E196"),
        (("plan", "{loads}", *SIZE, "--exact", "0"), "--exact"),
        (("plan", "{loads}", *SIZE, "--exact", "1", "--allow-duplicates"), "E192"),
        (("plan", "{loads}", "--ranks", "12", "--slots", "72", "--exact", "1"), "at most 64"),
        (("plan", "{loads}", *SIZE, "--slot-mib", "0"), "--slot-mib"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "25"), "'25' is no link"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "nvlink=3"), "'nvlink' is no link"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "host=fast"), "'fast' is no speed"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "host=0"), "E193"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "host=nan"), "E193"),
        (("plan", "{loads}", *SIZE, "--bandwidth", "host=1,host=2"), "twice"),
        (("replay", "{loads}", *SIZE, "--policy", "x"), "E191"),
        (("replay", "one.npz", *SIZE), "E194"),
        (("replay", "{loads}", *SIZE, "--hidden", "2"), "--hidden"),
        (("replay", "{loads}", *SIZE, "--min-gain", "-1"), "--min-gain"),
        (("replay", "{loads}", *SIZE, "--min-gain", "nan"), "not a finite number"),
        (("replay", "{loads}", *SIZE, "--max-moves", "nan"), "not a finite number"),
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
        "print(sorted({'torch', 'pydantic', 'scipy.linalg', 'pandas'} & set(sys.modules)))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
