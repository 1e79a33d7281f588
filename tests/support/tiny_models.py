"""Tiny random models of transformers, saved as checkpoints, whose routers decide firmly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

__all__ = ["EXPERTS", "FAMILIES", "HIDDEN", "TOP_K", "make", "moe_outputs", "save"]

HIDDEN, EXPERTS, TOP_K = 32, 8, 2
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K, "initializer_range": 0.3,
}  # fmt: skip
_QWEN: dict[str, Any] = {"intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": EXPERTS}
_MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (
        MixtralConfig, MixtralForCausalLM,
        {"num_hidden_layers": 4, "intermediate_size": 48, "num_local_experts": EXPERTS},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig, Qwen2MoeForCausalLM,
        {"num_hidden_layers": 5, "mlp_only_layers": [1], "shared_expert_intermediate_size": 24, **_QWEN},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM,
        {"num_hidden_layers": 8, "decoder_sparse_step": 2, "norm_topk_prob": True, **_QWEN},
    ),
    "deepseek_v3": (
        DeepseekV3Config, DeepseekV3ForCausalLM,
        {
            "num_hidden_layers": 5, "first_k_dense_replace": 1, "intermediate_size": 64, "moe_intermediate_size": 16,
            "n_routed_experts": EXPERTS, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
            "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8,
        },
    ),
}  # fmt: skip


def make(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with four MoE layers, unless `changes` of its configuration say otherwise."""
    config, model, sizes = _MADE[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = model(config(**{**_COMMON, **sizes, **changes})).eval().to(dtype)
        for name, bias in made.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.randn(bias.shape) * 0.2)
    return made


def save(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Make a model and save it in many small files."""
    model = make(family, **changes)
    model.save_pretrained(folder, max_shard_size="30KB")
    return model


@torch.no_grad()
def moe_outputs(model: PreTrainedModel, layers: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    """What the MoE blocks of `layers` give for their inputs x [L, ..., D]."""
    blocks = [model.model.layers[layer].mlp for layer in layers]
    flat = [block(inputs.reshape(1, -1, inputs.shape[-1])) for block, inputs in zip(blocks, x, strict=True)]
    return torch.stack(flat).view(x.shape)
