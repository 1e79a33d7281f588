"""``eplbctl convert``, and what ``plan`` and ``replay`` say of the files they read and write."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eplbctl.commands import convert, plan
from moe_eplb.planning.formats.loads import read_counts
from moe_eplb.planning.formats.registry import LOADS, PLACEMENTS

from .conftest import Call

SIZE = ("--ranks", "4", "--slots", "24")
ROOT = Path(__file__).resolve().parents[2]
WRITTEN = sorted(name for name, form in LOADS.items() if form.write)


def _counts() -> Any:
    rng = np.random.default_rng(0)
    return rng.poisson(400 * np.exp(rng.normal(0, 1, (1, 3, 16))), (6, 3, 16))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Loads of layers 1, 2 and 4 in every form, made without our writers."""
    counts = _counts()
    dense = np.zeros((6, 5, 16), np.int64)
    dense[:, [1, 2, 4]] = counts
    np.savez(tmp_path / "a.npz", counts=counts, layer_ids=[1, 2, 4])
    np.savez(tmp_path / "t.npz", topk_ids=np.argsort(np.random.default_rng(1).random((64, 3, 16)))[..., :2])
    (tmp_path / "run").mkdir()
    np.savez(tmp_path / "run" / "loads.npz", counts=counts)
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": dense.tolist()}))
    torch.save({"rank": 0, "logical_count": torch.from_numpy(dense)}, tmp_path / "stat.pt")
    (tmp_path / "dumps").mkdir()
    slots = torch.arange(16).repeat(5, 1)
    for rank in range(2):
        records = [
            {
                "forward_pass_id": i,
                "rank": rank,
                "gatherer_key": "p",
                "global_physical_count": torch.from_numpy(dense[i]),
            }
            for i in range(6)
        ]
        made = {"records": records, "last_physical_to_logical_map": slots}
        torch.save(made, tmp_path / "dumps" / f"{rank}.pt")
    (tmp_path / "stats").mkdir()
    (tmp_path / "stats" / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 2}')
    tensors = {f"{step}_{layer}": counts[step, i] for step in range(6) for i, layer in enumerate((1, 2, 4))}
    save_file(tensors, tmp_path / "stats" / "rank0.safetensors")
    save_file({"model": counts.sum(axis=0).astype(np.float32)}, tmp_path / "v.safetensors", {"version": "1"})
    names = {
        "npz": "a.npz", "npz_tokens": "t.npz", "run": "run", "sglang": "a.json", "sglang_stat": "stat.pt",
        "sglang_per_pass": "dumps", "tensorrt_llm": "stats", "vllm": "v.safetensors",
    }  # fmt: skip
    return {form: tmp_path / name for form, name in names.items()}


@pytest.mark.parametrize("form", sorted(set(LOADS) - {"json"}))
def test_plans_for_every_form_and_converts_it(call: Call, files: dict[str, Path], form: str) -> None:
    source = (str(files[form]), "--tokens-per-window", "16")
    answer = call("plan", *source, *SIZE)
    assert answer.code == 0, answer.err
    assert f"read as {form}: " in answer.out
    assert "unknown, since this form does not hold it: " in answer.out
    planned = json.loads(call("plan", *source, *SIZE, "--format", "json").out)
    assert planned["read"]["form"] == form
    assert planned["written"] is None
    answer = call("convert", "loads", *source, "-o", "ours.json")
    assert answer.code == 0, answer.err
    assert "wrote ours.json as json" in answer.out
    assert "not in ours.json" not in answer.out
    again = json.loads(call("plan", "ours.json", *SIZE, "--format", "json").out)
    assert [one["balancedness"] for one in again["plans"]] == [one["balancedness"] for one in planned["plans"]]
    assert again["layer_ids"] == planned["layer_ids"]


@pytest.mark.parametrize("form", WRITTEN)
def test_loads_into_every_form(call: Call, files: dict[str, Path], form: str) -> None:
    arguments = ("convert", "loads", str(files["npz"]), "-o", "out", "--to", form, "--top-k", "2")
    answer = call(*arguments)
    assert answer.code == 0, answer.err
    told = json.loads(call("convert", "loads", "out", "-o", "o.json", "--format", "json").out)
    assert told["read"]["form"] == form
    assert told["written"] == {"form": "json", "lost": [], "left_out": [], "path": "o.json"}
    assert ("not in out: " in answer.out) == (form != "json")
    taken = call(*arguments)
    assert (taken.code, taken.out) == (2, "")
    assert "E002" in taken.err
    forced = call(*arguments, "--force")
    assert (forced.code == 0) == (form != "tensorrt_llm"), forced.err


def test_layers_without_numbers_are_shown_and_numbered(call: Call, files: dict[str, Path]) -> None:
    source = str(files["vllm"])
    answer = call("plan", source, *SIZE, "-o", "p.yaml", "--to", "tensorrt_llm")
    assert "layers 0-2, counted among those with experts" in answer.out
    assert "the layers' own numbers are not known" in answer.err
    answer = call(
        "plan", source, *SIZE, "--layers", "1-2,4", "-o", "q.yaml", "--to", "tensorrt_llm", "--format", "json"
    )
    assert "not known" not in answer.err
    made = json.loads(answer.out)
    assert (made["layer_ids"], made["read"]["numbered"], made["written"]["form"]) == ([1, 2, 4], True, "tensorrt_llm")
    assert "the number of ranks" in made["written"]["lost"]
    assert "4: [" in Path("q.yaml").read_text()
    assert "layers 1-2,4, as the model numbers them" in call("plan", str(files["npz"]), *SIZE).out
    fitted = call("plan", source, *SIZE, "--current", "q.yaml", "--policy", "static", "--format", "json")
    assert json.loads(fitted.out)["plans"][0]["moved"] == 0


@pytest.mark.parametrize("form", sorted(PLACEMENTS))
def test_placements_from_and_into_every_form(call: Call, files: dict[str, Path], form: str) -> None:
    loads = str(files["npz"])
    assert call("plan", loads, *SIZE, "-o", "ours.json").code == 0
    answer = call("convert", "placement", "ours.json", "-o", "other", "--to", form)
    assert answer.code == 0, answer.err
    assert "read as json: 16 experts in 24 slots of 4 ranks, 3 layers" in answer.out
    answer = call("convert", "placement", "other", "--ranks", "4", "-o", "back.json", "--format", "json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["read"]["form"] == form
    answer = call("plan", loads, *SIZE, "--current", "back.json", "--policy", "static", "--format", "json")
    assert json.loads(answer.out)["plans"][0]["moved"] == 0


def test_what_a_placement_does_not_say_is_said(call: Call, files: dict[str, Path]) -> None:
    loads = str(files["npz"])
    assert call("plan", loads, *SIZE, "-o", "map.json", "--to", "vllm").code == 0
    answer = call("plan", loads, *SIZE, "--current", "map.json")
    assert "the current placement read as vllm\nunknown, since this form does not hold it: the model" in answer.out
    told = json.loads(call("plan", loads, *SIZE, "--current", "map.json", "--format", "json").out)
    assert told["current"]["form"] == "vllm"
    to_yaml = ("convert", "placement", "map.json", "--ranks", "4", "--to", "tensorrt_llm")
    assert "the layers' own numbers are not known" in call(*to_yaml, "-o", "a.yaml").out
    assert "not known" not in call(*to_yaml, "-o", "b.yaml", "--layers", "1,2,4").out
    assert "4: [" in Path("b.yaml").read_text()


def test_windows_are_summed(call: Call, files: dict[str, Path]) -> None:
    stat, stats = str(files["sglang_stat"]), str(files["tensorrt_llm"])
    assert "last of 6 windows, whose order is not known (--merge 0 sums them)" in call("plan", stat, *SIZE).out
    assert "newest of 6 windows" in call("plan", stats, *SIZE).out
    answer = call("plan", stats, *SIZE, "--merge", "0")
    assert "one window; 16 experts" in answer.out
    assert call("convert", "loads", stats, "--merge", "4", "-o", "o.json").code == 0
    merged = read_counts(Path("o.json"))
    assert merged.counts.tolist() == [_counts()[2:].sum(axis=0).tolist()]
    assert merged.origin.iterations == (2,)
    told = call("plan", stats, *SIZE, "--merge", "4").out
    assert "note: the 2 first windows fill no sum of 4 and are left out" in told
    refused = call("plan", stats, *SIZE, "--merge", "7")
    assert (refused.code, refused.out) == (2, "")
    assert "E195" in refused.err


def test_replay_says_what_it_read(call: Call, files: dict[str, Path]) -> None:
    answer = call("replay", str(files["sglang_stat"]), *SIZE, "--policy", "static")
    assert answer.code == 0, answer.err
    assert "read as sglang_stat" in answer.out
    told = json.loads(call("replay", str(files["tensorrt_llm"]), *SIZE, "--policy", "static", "--format", "json").out)
    assert told["read"]["left_out"] == ["the counts of each rank alone"]
    assert told["read"]["origin"]["iterations"] == [0, 5]


class _Payload:
    def __reduce__(self) -> Any:
        return (os.system, ("touch owned",))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("plan", "evil.pt", *SIZE), "E197"), (("plan", "bare.pt", *SIZE), "E197"),
        (("replay", "evil.pt", *SIZE), "E197"), (("convert", "loads", "evil.pt", "-o", "x"), "E197"),
        (("convert", "placement", "evil.pt", "--ranks", "2", "-o", "x"), "E197"),
        (("plan", "a.npz", *SIZE, "--current", "evil.pt"), "E197"),
        (("plan", "stats", *SIZE, "--experts", "12"), "E198"),
        (("plan", "stats", *SIZE, "--current", "eplb.yaml"), "E198"),
        (("plan", "a.npz", *SIZE, "--experts", "8"), "E195"),
        (("plan", "a.npz", *SIZE, "--layers", "3-5"), "E195"), (("plan", "run", *SIZE, "--layers", "3"), "E195"),
        (("plan", "run", *SIZE, "--layers", "3-"), "E080"), (("plan", "run", *SIZE, "--layers", "x"), "E080"),
        (("plan", "v.safetensors", *SIZE, "--model", "mtp"), "E196"), (("plan", "dumps/nothing", *SIZE), "E040"),
        (("convert", "loads", "a.npz", "-o", "x", "--to", "tensorrt_llm"), "--top-k"),
        (("convert", "loads", "stats", "-o", "x", "--top-k", "3"), "E195"),
        (("convert", "loads", "a.npz", "-o", "run", "--to", "tensorrt_llm", "--top-k", "2"), "E002"),
        (("convert", "loads", "a.npz", "-o", "a.npz", "--to", "tensorrt_llm", "--force", "--top-k", "2"), "E002"),
        (("convert", "loads", "a.npz"), "--output"), (("convert", "placement", "eplb.yaml", "-o", "x"), "--ranks"),
        (("convert", "placement", "omni.npy", "--ranks", "4", "-o", "x"), "E195"),
        (("convert", "placement", "omni.npy", "--layers", "1,1", "-o", "x"), "E195"),
        (("plan", "a.npz", *SIZE, "--current", "omni.npy"), "E195"),
        (("convert", "placement", "a.npz", "-o", "x"), "E04"), (("convert", "loads", "eplb.yaml", "-o", "x"), "E041"),
    ],
)  # fmt: skip
def test_what_is_refused(call: Call, files: dict[str, Path], arguments: tuple[str, ...], what: str) -> None:
    torch.save({"logical_count": _Payload()}, "evil.pt")
    Path("bare.pt").write_bytes(pickle.dumps(_Payload()))
    np.save("omni.npy", np.ones((2, 2, 16), int))
    row = [slot % 12 for slot in range(16)]
    Path("eplb.yaml").write_text(f"num_slots: 16\ninitial_global_assignments: {{1: {row}, 2: {row}, 4: {row}}}\n")
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, ""), answer.err
    assert what in answer.err
    assert "Traceback" not in answer.err
    assert not Path("owned").exists()
    assert not Path("x").exists()


def test_only_files_of_torch_need_torch(files: dict[str, Path]) -> None:
    names = [str(path) for form, path in files.items() if form not in ("sglang_stat", "sglang_per_pass")]
    program = (
        "import sys\nfrom moe_eplb.planning.formats.loads import read_counts, Reading\nfrom pathlib import Path\n"
        f"for name in {names}: read_counts(Path(name), Reading(16))\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_choices_are_the_forms() -> None:
    assert sorted(convert._LOADS) == WRITTEN
    assert set(convert._PLACEMENTS) == set(plan._FORMS) == set(PLACEMENTS)


def test_a_name_that_is_no_text_is_kept_readable(call: Call, files: dict[str, Path]) -> None:
    odd = Path(os.fsdecode(b"\xff.npz"))
    files["npz"].rename(odd)
    assert call("convert", "loads", odd, "-o", "o.json").code == 0
    assert read_counts(Path("o.json")).source == "\\udcff.npz"
    assert call("plan", odd, *SIZE, "-o", "p.json").code == 0
    assert call("plan", "o.json", *SIZE, "--current", "p.json").code == 0
