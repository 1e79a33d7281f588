"""The model of a scenario: a stack of pre-norm residual MoE blocks, built under its balancer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_eplb.balancer import moe_load_balancer_set_repeated_for_next_layer
from moe_eplb.core import workload
from moe_eplb.core.evidence import EvidenceWriter
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device
from moe_eplb.models import MoeBlock
from moe_eplb.moe import SuppliedMoeRoutingMethod
from moe_eplb.session.balancing import layer_placement_slots
from moe_eplb.session.blocks import FamilyBlocks, PlainBlocks
from moe_eplb.session.groups import Groups
from moe_eplb.session.weights import seeded_generator, torch_dtype

__all__ = ["Inputs", "MoeStack"]


class Inputs(NamedTuple):
    """Hidden states [T, D], T of each rank, and by layer and repeat the expert ids int32 [T, K] that are supplied."""

    x: Tensor
    tokens: tuple[int, ...]
    ids: Mapping[tuple[int, int], Tensor]


class MoeStack:
    """L MoE blocks of one rank. Must be built inside the balancer's context where there is one.

    Args:
        scenario: What to build.
        rank: This rank.
        device: Where it runs.
        groups: Process groups of the ranks.

    Attributes:
        blocks: The blocks in order.
        masters: For each block, its weights.
    """

    def __init__(self, scenario: Scenario, rank: int, device: Device, groups: Groups) -> None:
        self._scenario, self._rank, self._device = scenario, rank, device
        self._ahead: dict[int, Inputs] = {}
        maker = FamilyBlocks(scenario, device) if scenario.model.hf is not None else PlainBlocks(scenario, device)
        self.blocks: list[MoeBlock] = []
        for layer in range(scenario.model.layers):
            moe_load_balancer_set_repeated_for_next_layer(scenario.model.repeats(layer))
            self.blocks.append(maker.block(layer, **self._options(layer, groups)))
        self.masters = [maker.master(layer) for layer in range(scenario.model.layers)]

    def load(self, iteration: int) -> Callable[[], Tensor]:
        """See `Model`."""
        return partial(self.forward, self.inputs(iteration))

    def prefetch(self, iterations: Iterable[int]) -> None:
        """See `Model`. Where experts are supplied, no time depends on hidden states: steps of as many share them."""
        drawn: dict[int, Tensor] = {}
        self._ahead = {iteration: self._drawn(iteration, drawn) for iteration in iterations}

    def inputs(self, iteration: int) -> Inputs:
        """This rank's inputs of an iteration; for those that were drawn ahead, once."""
        return self._ahead.pop(iteration, None) or self._drawn(iteration, {})

    def _drawn(self, iteration: int, drawn: dict[int, Tensor]) -> Inputs:
        """Inputs of an iteration, the hidden states taken from `drawn` by their number where experts are supplied."""
        tokens = tuple(workload.tokens(self._scenario, iteration, rank) for rank in range(self._scenario.ranks))
        ids, mine = self._ids(iteration), tokens[self._rank]
        if not ids or mine not in drawn:
            drawn[mine] = self._input(iteration, mine)
        return Inputs(drawn[mine], tokens, ids)

    def forward(self, inputs: Inputs) -> Tensor:
        """Hidden states [T, D] after all blocks."""
        x, tokens, ids = inputs
        for layer, block in enumerate(self.blocks):
            for repeat in range(self._scenario.model.repeats(layer)):
                if isinstance(block.moe.routing_method, SuppliedMoeRoutingMethod):
                    block.moe.routing_method.supply(ids[layer, repeat])
                x = x + block(torch.nn.functional.rms_norm(x, x.shape[-1:]), tokens)
        return x

    def finish(self, evidence: EvidenceWriter) -> None:
        """Nothing beside what the probes have seen."""

    def _input(self, iteration: int, tokens: int) -> Tensor:
        generator = seeded_generator("input", self._scenario.seed, iteration, self._rank)
        x: Tensor = torch.randn(tokens, self._scenario.model.hidden, generator=generator)
        return x.to(self._device.torch_device, torch_dtype(self._scenario.model.dtype))

    def _ids(self, iteration: int) -> dict[tuple[int, int], Tensor]:
        """The expert ids that a workload supplies, by layer and repeat."""
        ids = {}
        for layer, block in enumerate(self.blocks):
            if isinstance(block.moe.routing_method, SuppliedMoeRoutingMethod):
                for repeat in range(self._scenario.model.repeats(layer)):
                    chosen = workload.topk_ids(self._scenario, iteration, layer, self._rank, repeat)
                    ids[layer, repeat] = torch.from_numpy(chosen).to(self._device.torch_device)
        return ids

    def _options(self, layer: int, groups: Groups) -> dict[str, Any]:
        s = self._scenario
        options: dict[str, Any] = {
            "backend": s.model.backend,
            "moe_max_num_tokens": s.moe_max_num_tokens,
            "layer_idx": layer,
        }
        if s.model.backend != "wide_ep":
            return options | {"ep_rank": self._rank, "ep_size": s.ranks}
        return options | {
            "initial_slots": layer_placement_slots(s, layer),
            "num_slots": s.slots,
            "ep_group": groups.model,
            "statistics_group": groups.statistics,
            "dispatch": s.dispatch,
            "statistics": s.statistics_path,
        }
