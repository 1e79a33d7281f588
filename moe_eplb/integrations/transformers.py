"""Hugging Face transformers models whose MoE blocks are ours, one process for each rank.

Every rank holds the whole model but its experts, has its own sequences, and shares the experts with the others:

    with balancer:
        replace_moe_blocks(model, device, ep_group=group, num_slots=P, ...)
    balancer.finalize_model()
    balancer.set_iter_info(enable_statistic=True, enable_update_weights=True)
    with iterations(model, balancer):
        model.generate(input_ids, do_sample=False, max_new_tokens=64)

Every forward exchanges tokens with the other ranks, so all ranks must make equally many: give `generate` the same
`max_new_tokens` and no end token on every rank, or ``synced_gpus=True``, which makes finished ranks go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_eplb.balancer import MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core import architecture
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.device import Device
from moe_eplb.models import MoeBlock, build_blocks
from moe_eplb.models.shards import has_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModuleWeights", "Replaced", "iterations", "load_model", "replace_moe_blocks"]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A block of ours, the number of its layer in the model, and the original experts' weights by expert."""

    layer: int
    block: MoeBlock
    weights: Callable[[int], Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] | None


def load_model(folder: Path, *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a local folder; with a configuration alone its weights are drawn from `seed`.

    Raises:
        UsageError: E017 without the transformers package.
        ScenarioError: E046 when the folder's weights cannot be loaded.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UsageError(
            "E017", "whole models need the package transformers", why=str(error), hint="pip install 'moe-eplb[hf]'"
        ) from error
    if not has_weights(folder):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            drawn: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            drawn.train(False)
            return drawn
    try:
        with _no_progress_bar():
            read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
        read.train(False)
        return read
    except Exception as error:  # transformers raises whatever its parts do; the cause is in the file
        raise ScenarioError("E046", "the model's weights cannot be loaded", why=str(error), where=str(folder)) \
            from error  # fmt: skip


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A bar for each rank tells nobody anything, and the first one leaves a thread that watches bars behind."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def replace_moe_blocks(model: PreTrainedModel, device: Device, **options: Any) -> list[Replaced]:
    """Put a `MoeBlock` in the place of every MoE block of a Mixtral, Qwen2-MoE, Qwen3-MoE or DeepSeek-V3 model.

    Call it inside the balancer's context where there is one. The original experts stay alive only through the result.

    Args:
        model: Changed in place.
        device: Where the blocks run.
        options: See `moe_eplb.models.build_blocks`.

    Raises:
        ScenarioError: E044, E045 for a model that is not supported.
    """
    found = architecture.parse(model.config.to_dict(), type(model).__name__)
    weights = ModuleWeights(model, found)
    dtype = next(model.parameters()).dtype
    blocks = build_blocks(found, weights, device, dtype=dtype, **options)
    replaced = []
    for layer, block in zip(found.moe_layers, blocks, strict=True):
        model.model.layers[layer].mlp = block
        expert = functools.partial(weights.expert, layer)
        replaced.append(Replaced(layer, block, expert, weights.shared(layer)))
    return replaced


@contextmanager
def iterations(model: nn.Module, balancer: MoeLoadBalancer | None) -> Iterator[None]:
    """Inside the block each forward of the model is an iteration of the balancer."""
    forward = model.forward

    @functools.wraps(forward)
    def iterate(*args: Any, **kwargs: Any) -> Any:
        with MoeLoadBalancerIterContext(balancer):
            return forward(*args, **kwargs)

    model.forward = iterate
    try:
        yield
    finally:
        model.forward = forward


class ModuleWeights:
    """Weights of a transformers model's own MoE blocks, by number of layer; see `moe_eplb.models.Weights`."""

    def __init__(self, model: PreTrainedModel, found: Architecture) -> None:
        self._blocks: dict[int, Any] = {layer: model.model.layers[layer].mlp for layer in found.moe_layers}

    def router(self, layer: int) -> Tensor:
        """[E, D]."""
        weight: Tensor = self._blocks[layer].gate.weight
        return weight.detach()

    def router_bias(self, layer: int) -> Tensor | None:
        """[E] where the family has one."""
        bias: Tensor | None = getattr(self._blocks[layer].gate, "e_score_correction_bias", None)
        return None if bias is None else bias.detach()

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """``w3_w1`` [2I, D] and ``w2`` [D, I]; transformers keeps the rows of w1 (gate) before those of w3 (up)."""
        experts = self._blocks[layer].experts
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        return {"w3_w1": torch.cat((up, gate)), "w2": experts.down_proj[expert].detach()}

    def shared(self, layer: int) -> dict[str, Tensor] | None:
        """Of the shared expert, with ``gate`` [1, D] where it has one."""
        block = self._blocks[layer]
        shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
        if shared is None:
            return None
        weights = {
            "w3_w1": torch.cat((shared.up_proj.weight, shared.gate_proj.weight)).detach(),
            "w2": shared.down_proj.weight.detach(),
        }
        gate = getattr(block, "shared_expert_gate", None)
        return weights if gate is None else weights | {"gate": gate.weight.detach()}
