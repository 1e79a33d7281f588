"""Checkpoints: what is read from them, and what is said about those that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_eplb.core import architecture
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.errors import ScenarioError
from moe_eplb.models import CheckpointWeights, SeededWeights, open_weights
from tests.support import tiny_models

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of every family, in many shards."""
    folder = tmp_path_factory.mktemp("saved")
    for family in tiny_models.FAMILIES:
        tiny_models.save(family, folder / family)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the Qwen2-MoE checkpoint to damage."""
    for path in (saved / "qwen2_moe").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _opened(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(folder, architecture.read(folder))


def _map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def _rewrite_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def _rewrite_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor in its shard by what `change` makes of it, or remove it."""
    path = folder / _map(folder)[name]
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, path)


def _error(folder: Path, use: Callable[[CheckpointWeights], object] = lambda weights: None) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        use(_opened(folder))
    return caught.value


def _expert_of_layer_2(weights: CheckpointWeights) -> object:
    return weights.expert(2, 5)


EXPERT = "model.layers.2.mlp.experts.5."


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_tensor_is_that_of_the_model(saved: Path, family: str) -> None:
    model = tiny_models.make(family)
    found = architecture.read(saved / family)
    weights = CheckpointWeights(saved / family, found)
    for layer in found.moe_layers:
        block = model.model.layers[layer].mlp
        assert torch.equal(weights.router(layer), block.gate.weight)
        bias = weights.router_bias(layer)
        if family == "deepseek_v3":
            assert bias is not None
            assert torch.equal(bias, block.gate.e_score_correction_bias)
            assert bool(bias.any())
        else:
            assert bias is None
        for expert in range(found.experts):
            given = weights.expert(layer, expert)
            w3, w1 = given["w3_w1"].chunk(2)
            assert torch.equal(torch.cat((w1, w3)), block.experts.gate_up_proj[expert])
            assert torch.equal(given["w2"], block.experts.down_proj[expert])


@pytest.mark.parametrize(("family", "module"), [("qwen2_moe", "shared_expert"), ("deepseek_v3", "shared_experts")])
def test_the_shared_expert_is_that_of_the_model(saved: Path, family: str, module: str) -> None:
    model = tiny_models.make(family)
    layer = architecture.read(saved / family).moe_layers[-1]
    given, block = _opened(saved / family).shared(layer), model.model.layers[layer].mlp
    assert given is not None
    shared = getattr(block, module)
    assert torch.equal(given["w3_w1"], torch.cat((shared.up_proj.weight, shared.gate_proj.weight)))
    assert torch.equal(given["w2"], shared.down_proj.weight)
    if family == "qwen2_moe":
        assert torch.equal(given["gate"], block.shared_expert_gate.weight)
    else:
        assert "gate" not in given


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_families_without_shared_expert(saved: Path, family: str) -> None:
    assert _opened(saved / family).shared(3) is None


def test_only_what_is_asked_for_is_read(saved: Path) -> None:
    weights = _opened(saved / "qwen2_moe")
    assert weights.bytes_read == {}
    weights.expert(2, 5)
    size = tiny_models.HIDDEN * 16 * 4
    assert weights.bytes_read == {f"{EXPERT}{name}_proj.weight": size for name in ("gate", "up", "down")}


def test_what_is_given_outlives_the_files(damaged: Path) -> None:
    given = _opened(damaged).expert(2, 5)
    kept = {name: tensor.clone() for name, tensor in given.items()}
    for path in damaged.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(given[name], kept[name]) for name in kept)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    model = tiny_models.make("mixtral")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / INDEX).exists()
    assert torch.equal(_opened(tmp_path).router(3), model.model.layers[3].mlp.gate.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_given_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_models.save("qwen3_moe", tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in _opened(tmp_path).expert(1, 0).values()} == {dtype}


# -- where no weights can be had ---------------------------------------------------------------------------------------


def test_a_folder_with_a_configuration_alone_has_its_weights_drawn(saved: Path, damaged: Path) -> None:
    found = architecture.read(damaged)
    assert isinstance(open_weights(damaged, found, seed=1, dtype=torch.float32), CheckpointWeights)
    for path in damaged.glob("*.safetensors*"):
        path.unlink()
    assert isinstance(open_weights(damaged, found, seed=1, dtype=torch.float32), SeededWeights)
    error = _error(damaged)
    assert (error.code, error.why) == ("E046", "neither model.safetensors nor model.safetensors.index.json is there")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_and_not_replaced_by_drawn_weights(damaged: Path, name: str) -> None:
    for path in damaged.glob("*.safetensors*"):
        path.unlink()
    (damaged / name).write_bytes(b"")
    with pytest.raises(ScenarioError, match=rf"E046(.|\n)*{name} is a pickle(.|\n)*save_pretrained"):
        open_weights(damaged, architecture.read(damaged), seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "no 'weight_map'"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": 7}', "names no tensor"),
        ('{"weight_map": {}}', "names no tensor"),
        ("\udcff", "utf-8"),
    ],
    ids=["empty", "deep", "list", "no map", "number", "no tensor", "bytes"],
)
def test_a_damaged_index(damaged: Path, text: str, why: str) -> None:
    (damaged / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    error = _error(damaged)
    assert (error.code, error.where) == ("E046", str(damaged / INDEX))
    assert why in error.why


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", 7, None, "a\0b"])
def test_an_index_may_name_nothing_outside_its_folder(damaged: Path, shard: Any) -> None:
    _rewrite_index(damaged, lambda index: index["weight_map"].update({f"{EXPERT}up_proj.weight": shard}))
    error = _error(damaged)
    assert (error.code, error.what) == ("E046", "the checkpoint's index names a file outside its folder")


def test_an_index_that_names_a_missing_shard(damaged: Path) -> None:
    shard = _map(damaged)[f"{EXPERT}up_proj.weight"]
    (damaged / shard).unlink()
    error = _error(damaged)
    assert (error.code, error.why) == ("E046", f"{shard} (1 in all)")


# -- tensors and shards ------------------------------------------------------------------------------------------------


def test_a_tensor_that_the_index_does_not_name(damaged: Path) -> None:
    _rewrite_index(damaged, lambda index: index["weight_map"].pop(f"{EXPERT}up_proj.weight"))
    error = _error(damaged, _expert_of_layer_2)
    assert (error.code, error.where) == ("E047", str(damaged))
    assert f"{EXPERT}up_proj.weight" in error.what
    assert "the nearest name there is 'model.layers." in error.why


def test_a_tensor_that_its_shard_does_not_have(damaged: Path) -> None:
    name = f"{EXPERT}up_proj.weight"
    _rewrite_tensor(damaged, name, lambda tensor: None)
    error = _error(damaged, _expert_of_layer_2)
    assert (error.code, error.where) == ("E047", str(damaged / _map(damaged)[name]))
    assert name in error.what
    assert "the nearest name there is" in error.why


def test_a_renamed_tensor_is_found_as_the_nearest(damaged: Path) -> None:
    name = f"{EXPERT}up_proj.weight"
    path = damaged / _map(damaged)[name]
    tensors = load_file(path)
    tensors[f"{EXPERT}up_projection.weight"] = tensors.pop(name)
    save_file(tensors, path)
    assert f"'{EXPERT}up_projection.weight'" in _error(damaged, _expert_of_layer_2).why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensor: tensor.T.contiguous(), "F32 [32, 16], wanted: [16, 32] of F32, BF16, F16"),
        (lambda tensor: tensor[:-1].contiguous(), "F32 [15, 32], wanted: [16, 32] of F32, BF16, F16"),
        (lambda tensor: tensor.flatten(), "F32 [512], wanted: [16, 32] of F32, BF16, F16"),
        (lambda tensor: tensor.to(torch.int8), "I8 [16, 32], wanted: [16, 32] of F32, BF16, F16"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "F8_E4M3 [16, 32], wanted: [16, 32] of F32, BF16, F16"),
    ],
    ids=["transposed", "short", "flat", "int8", "float8"],
)
def test_a_tensor_of_another_shape_or_dtype(
    damaged: Path, change: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    _rewrite_tensor(damaged, f"{EXPERT}up_proj.weight", change)
    error = _error(damaged, _expert_of_layer_2)
    assert (error.code, error.why) == ("E048", why)
    assert f"{EXPERT}up_proj.weight" in error.what


@pytest.mark.parametrize(
    ("use", "changed"),
    [
        (lambda weights: weights.router(2), {"experts": 9}),
        (lambda weights: weights.expert(2, 0), {"intermediate": 15}),
        (lambda weights: weights.expert(2, 0), {"hidden": 31}),
        (lambda weights: weights.shared(2), {"shared_intermediate": 25}),
    ],
    ids=["router", "intermediate", "hidden", "shared"],
)
def test_a_configuration_of_another_model(
    saved: Path, use: Callable[[CheckpointWeights], object], changed: dict[str, Any]
) -> None:
    folder = saved / "qwen2_moe"
    other: Architecture = replace(architecture.read(folder), **changed)
    with pytest.raises(ScenarioError, match="E048"):
        use(CheckpointWeights(folder, other))


def test_a_configuration_with_more_experts_than_the_weights(saved: Path) -> None:
    folder = saved / "qwen3_moe"
    weights = CheckpointWeights(folder, architecture.read(folder))
    with pytest.raises(ScenarioError, match=r"E047.*experts\.8\."):
        weights.expert(1, 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:100],
        lambda whole: whole[:4],
        lambda whole: b"",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: b"PK\x03\x04" + whole,
        lambda whole: whole[:8] + b"x" + whole[9:],
    ],
    ids=["last byte", "header", "length", "empty", "huge header", "zip", "no json"],
)
def test_a_truncated_or_foreign_shard(damaged: Path, damage: Callable[[bytes], bytes]) -> None:
    path = damaged / _map(damaged)[f"{EXPERT}up_proj.weight"]
    path.write_bytes(damage(path.read_bytes()))
    error = _error(damaged, _expert_of_layer_2)
    assert (error.code, error.where) == ("E049", str(path))
    assert f"{path.stat().st_size} bytes" in error.why


def test_a_shard_that_goes_away_while_it_is_needed(damaged: Path) -> None:
    weights = _opened(damaged)
    path = damaged / _map(damaged)[f"{EXPERT}up_proj.weight"]
    path.unlink()
    with pytest.raises(ScenarioError, match=r"E049(.|\n)*the file is gone"):
        weights.expert(2, 5)
