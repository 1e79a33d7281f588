"""The MoE blocks of a scenario: of its own sizes, or of a model's configuration and weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_eplb.core import architecture
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import AuxStreamType, Device
from moe_eplb.models import MoeBlock, SharedExpert, Weights, build_block, make_aux_streams, open_weights
from moe_eplb.moe import SuppliedMoeRoutingMethod, create_moe
from moe_eplb.moe.fp8 import in_expert_dtype
from moe_eplb.session.master import Master
from moe_eplb.session.routing import make_routing_method
from moe_eplb.session.weights import MasterWeights, expert_dtype, seeded_generator, torch_dtype

__all__ = ["FamilyBlocks", "PlainBlocks"]

_STREAMS = (AuxStreamType.MoeShared, AuxStreamType.MoeChunkingOverlap, AuxStreamType.MoeBalancer)


class PlainBlocks:
    """Blocks of a scenario's own sizes with seeded weights."""

    def __init__(self, scenario: Scenario, device: Device) -> None:
        self._scenario, self._device = scenario, device
        self._weights = [MasterWeights.of(scenario, layer) for layer in range(scenario.model.layers)]
        self._streams = {kind: device.stream(kind) for kind in _STREAMS}

    def master(self, layer: int) -> Master:
        """What the block is proved against."""
        return Master(self._weights[layer], self._weights[layer].shared)

    def block(self, layer: int, **options: Any) -> MoeBlock:
        """The block of a layer with its weights; `options` as of `create_moe`."""
        model, weights = self._scenario.model, self._weights[layer]
        moe = create_moe(
            make_routing_method(self._scenario, layer, self._device), num_experts=model.experts,
            hidden_size=model.hidden, intermediate_size=model.intermediate, dtype=torch_dtype(model.dtype),
            expert_dtype=expert_dtype(model.dtype), device=self._device, aux_stream_dict=self._streams, **options,
        )  # fmt: skip
        generator = seeded_generator("router", self._scenario.seed, layer)
        router: Tensor = torch.randn(model.hidden, model.experts, generator=generator) * model.hidden**-0.5
        where = self._device.torch_device
        shared = None if weights.shared is None else SharedExpert(**_on(where, weights.shared))
        block = MoeBlock(
            router.T.contiguous().to(where), moe, self._device, shared=shared, aux_stream_dict=self._streams,
            router_dtype=torch.float32,
        )  # fmt: skip
        block.load_weights(weights)
        return block


def _on(device: torch.device, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in weights.items()}


class FamilyBlocks:
    """The first MoE blocks of a Hugging Face model; where a workload chooses the experts, its router has no say.

    Raises:
        ScenarioError: E032 when the folder's configuration is no longer the one that the scenario was made from.
    """

    def __init__(self, scenario: Scenario, device: Device) -> None:
        folder = Path(scenario.model.hf or "")
        self._scenario, self._device = scenario, device
        self._architecture = architecture.read(folder)
        _require_same(scenario, self._architecture, folder)
        dtype = torch_dtype(scenario.model.dtype)
        self._weights: Weights = open_weights(folder, self._architecture, seed=scenario.seed, dtype=dtype)
        self._streams = make_aux_streams(self._architecture, device)

    def master(self, layer: int) -> Master:
        """What the block is proved against, read or drawn anew each time."""
        number = self._architecture.moe_layers[layer]
        shared = self._weights.shared(number)
        return Master(partial(self._expert, number), None if shared is None else self._in_dtype(shared))

    def block(self, layer: int, **options: Any) -> MoeBlock:
        """The block of a layer with its weights; `options` as of `create_moe`."""
        number = self._architecture.moe_layers[layer]
        block = build_block(
            self._architecture, self._weights, number, self._device, streams=self._streams,
            dtype=torch_dtype(self._scenario.model.dtype), expert_dtype=expert_dtype(self._scenario.model.dtype),
            **options,
        )  # fmt: skip
        if self._scenario.workload.kind != "model":
            block.moe.routing_method = SuppliedMoeRoutingMethod(self._architecture.top_k)
        return block

    def _expert(self, number: int, expert: int) -> dict[str, Tensor]:
        return in_expert_dtype(self._weights.expert(number, expert), expert_dtype(self._scenario.model.dtype))

    def _in_dtype(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = torch_dtype(self._scenario.model.dtype)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}


def _require_same(scenario: Scenario, found: architecture.Architecture, folder: Path) -> None:
    model = scenario.model
    names = ("experts", "top_k", "hidden", "intermediate", "shared_intermediate")
    changed = [
        f"{n} {getattr(model, n)}, now {getattr(found, n)}" for n in names if getattr(model, n) != getattr(found, n)
    ]
    if len(found.moe_layers) < model.layers:
        changed.append(f"layers {model.layers}, now {len(found.moe_layers)}")
    if changed:
        raise ScenarioError(
            "E032", "the model's configuration is not that of the scenario", why="; ".join(changed),
            hint="make the scenario anew from its file", where=str(folder / "config.json"),
        )  # fmt: skip
