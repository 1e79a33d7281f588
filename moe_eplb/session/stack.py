"""The model of a scenario: a stack of pre-norm residual MoE layers, built under its balancer."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_eplb.core import workload
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import AuxStreamType, Device
from moe_eplb.moe.create_moe import create_moe
from moe_eplb.moe.routing import (
    BaseMoeRoutingMethod,
    DeepSeekV3MoeRoutingMethod,
    DefaultMoeRoutingMethod,
    RenormalizeMoeRoutingMethod,
    SuppliedMoeRoutingMethod,
)
from moe_eplb.session.balancing import layer_placement_slots
from moe_eplb.session.groups import Groups
from moe_eplb.session.weights import MasterWeights, seeded_generator, torch_dtype

__all__ = ["MoeStack"]


class MoeStack:
    """L MoE layers of one rank. Must be built inside the balancer's context where there is one.

    Args:
        scenario: What to build.
        rank: This rank.
        device: Where it runs.
        groups: Process groups of the ranks.
    """

    def __init__(self, scenario: Scenario, rank: int, device: Device, groups: Groups) -> None:
        model = scenario.model
        self._scenario, self._rank = scenario, rank
        self._dtype = torch_dtype(model.dtype)
        self.masters = [
            MasterWeights(
                scenario.seed, layer, experts=model.experts, hidden=model.hidden, intermediate=model.intermediate,
                dtype=self._dtype,
            )
            for layer in range(model.layers)
        ]  # fmt: skip
        self._routers = [self._router_weight(layer) for layer in range(model.layers)]
        streams = {kind: device.stream(kind) for kind in (AuxStreamType.MoeChunkingOverlap, AuxStreamType.MoeBalancer)}
        self.layers = [
            create_moe(
                self._routing_method(layer), num_experts=model.experts, hidden_size=model.hidden,
                intermediate_size=model.intermediate, dtype=self._dtype, device=device, backend=model.backend,
                aux_stream_dict=streams, layer_idx=layer, **self._wide_ep_options(layer, groups),
            )
            for layer in range(model.layers)
        ]  # fmt: skip
        for moe, master in zip(self.layers, self.masters, strict=True):
            moe.load_weights(master)

    def step(self, iteration: int) -> Tensor:
        """One forward of the stack on this rank's tokens of the iteration; hidden states [T, D]."""
        x = self._input(iteration)
        for layer, (moe, router) in enumerate(zip(self.layers, self._routers, strict=True)):
            self._supply_ids(moe.routing_method, iteration, layer)
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:])
            x = x + moe(normed, normed.to(torch.float32) @ router)
        return x

    def _input(self, iteration: int) -> Tensor:
        tokens = workload.tokens(self._scenario, iteration, self._rank)
        generator = seeded_generator("input", self._scenario.seed, iteration, self._rank)
        x: Tensor = torch.randn(tokens, self._scenario.model.hidden, generator=generator).to(self._dtype)
        return x

    def _supply_ids(self, routing: BaseMoeRoutingMethod, iteration: int, layer: int) -> None:
        if isinstance(routing, SuppliedMoeRoutingMethod):
            ids = workload.topk_ids(self._scenario, iteration, layer, self._rank)
            routing.supply(torch.from_numpy(ids))

    def _router_weight(self, layer: int) -> Tensor:
        generator = seeded_generator("router", self._scenario.seed, layer)
        model = self._scenario.model
        weight: Tensor = torch.randn(model.hidden, model.experts, generator=generator) * model.hidden**-0.5
        return weight

    def _routing_method(self, layer: int) -> BaseMoeRoutingMethod:
        model, routing = self._scenario.model, self._scenario.model.routing
        if self._scenario.workload.kind != "model":
            return SuppliedMoeRoutingMethod(model.top_k)
        if routing.method == "default":
            return DefaultMoeRoutingMethod(model.top_k)
        if routing.method == "renormalize":
            return RenormalizeMoeRoutingMethod(model.top_k)
        bias = torch.randn(model.experts, generator=seeded_generator("bias", self._scenario.seed, layer)) * 0.1
        return DeepSeekV3MoeRoutingMethod(model.top_k, routing.groups, routing.top_groups, routing.scale, bias)

    def _wide_ep_options(self, layer: int, groups: Groups) -> dict[str, object]:
        s = self._scenario
        if s.model.backend != "wide_ep":
            return {}
        return {
            "initial_slots": layer_placement_slots(s, layer),
            "num_slots": s.slots,
            "ep_group": groups.model,
            "statistics_group": groups.statistics,
            "dispatch": s.dispatch,
            "statistics": s.statistics_path,
        }
