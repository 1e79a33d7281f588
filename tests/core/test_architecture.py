"""Architectures: what is read from config.json, and what is said about wrong values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_eplb.core import architecture
from moe_eplb.core.errors import ScenarioError

QWEN2 = {
    "model_type": "qwen2_moe", "hidden_size": 32, "num_hidden_layers": 4, "num_experts_per_tok": 2, "num_experts": 8,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 32, "num_hidden_layers": 5, "num_experts_per_tok": 2,
    "n_routed_experts": 8, "moe_intermediate_size": 16, "n_shared_experts": 2, "first_k_dense_replace": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_sizes_of_a_model_with_a_gated_shared_expert() -> None:
    found = architecture.parse(QWEN2, "here")
    assert (found.family, found.name, found.dtype) == ("qwen2_moe", "Qwen2MoeForCausalLM", "bfloat16")
    assert (found.experts, found.top_k, found.hidden, found.intermediate, found.shared_intermediate) == (
        8, 2, 32, 16, 24,
    )  # fmt: skip
    assert (found.hidden_layers, found.moe_layers, found.routing) == (4, (0, 1, 2, 3), {"method": "default"})


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 3}, (2,)),
        ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
    ],
)
def test_which_layers_are_sparse(changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert architecture.parse(QWEN2 | changes, "here").moe_layers == layers


def test_deepseek_v3() -> None:
    found = architecture.parse(DEEPSEEK, "here")
    assert (found.moe_layers, found.shared_intermediate, found.dtype) == ((2, 3, 4), 32, "float32")
    assert found.routing == {
        "method": "deepseek_v3", "groups": 4, "top_groups": 2, "scale": 2.5, "normalize": True,
    }  # fmt: skip


@pytest.mark.parametrize("key", ["n_group", "topk_group"])
def test_no_groups_are_one_group(key: str) -> None:
    routing = architecture.parse(DEEPSEEK | {"n_group": None, "topk_group": None}, "here").routing
    assert (routing["groups"], routing["top_groups"]) == (1, 1)
    assert architecture.parse({k: v for k, v in DEEPSEEK.items() if k != key}, "here").routing != routing


@pytest.mark.parametrize(("norm", "method"), [(True, "renormalize_naive"), (False, "default")])
def test_normalised_or_not(norm: bool, method: str) -> None:
    assert architecture.parse(QWEN2 | {"norm_topk_prob": norm}, "here").routing == {"method": method}
    assert architecture.parse(DEEPSEEK | {"norm_topk_prob": norm}, "here").routing["normalize"] is norm


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_has_several_names(name: str) -> None:
    config = {key: value for key, value in QWEN2.items() if key != "num_experts"} | {name: 6}
    assert architecture.parse(config, "here").experts == 6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["mixtral"]}, "is not supported"),
        ({"hidden_act": "gelu"}, "'hidden_act' of the model is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'quantization_config' of the model is not supported"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq' of the model is not supported"),
    ],
)
def test_models_that_are_not_supported(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ScenarioError, match="E044") as caught:
        architecture.parse(DEEPSEEK | changes, "here")
    assert text in caught.value.what
    assert caught.value.hint
    assert caught.value.where == "here"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_experts": None}, "num_experts"),
        ({"num_experts_per_tok": []}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"dtype": "int8"}, "dtype"),
        ({"norm_topk_prob": "maybe"}, "norm_topk_prob"),
    ],
)
def test_wrong_values(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ScenarioError, match="E045") as caught:
        architecture.parse(QWEN2 | changes, "here")
    assert caught.value.what == f"{key!r} of a qwen2_moe model is wrong"
    assert caught.value.why.endswith(f"not {changes[key]!r}")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_experts_per_tok", "moe_intermediate_size"])
def test_missing_values(key: str) -> None:
    with pytest.raises(ScenarioError, match="E045") as caught:
        architecture.parse({name: value for name, value in QWEN2.items() if name != key}, "here")
    assert (caught.value.what, caught.value.why) == (f"{key!r} of a qwen2_moe model is wrong", "it is missing")


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, "[]", '"qwen2_moe"', "\udcff"])
def test_files_that_hold_no_configuration(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ScenarioError, match="E043") as caught:
        architecture.read(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    assert architecture.read(tmp_path) == architecture.parse(QWEN2, "here")
