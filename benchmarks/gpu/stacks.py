"""A few MoE layers on one GPU or several, captured into a graph, with a balancer that idles or moves experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.layer_cases import Case
from benchmarks.gpu.ranks import ALONE, Ranks
from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import AuxStreamType, Device
from moe_eplb.device.captured import Captured
from moe_eplb.moe import DefaultMoeRoutingMethod, MoeShape, WideEPMoE
from moe_eplb.planning.online import Planner, Planning

__all__ = ["ForcedOptions", "Moves", "Stack", "TurningPlans", "build", "share_weights"]


class Moves(NullProbe):
    """Counts what a balancer does."""

    def __init__(self) -> None:
        self.commits = self.slots = self.bytes = self.drops = 0
        self.stalls: list[float] = []

    def committed(self, layer: int, taken: int, placement: Placement, changed: np.ndarray, nbytes: int) -> None:
        self.commits += 1
        self.slots += len(changed)
        self.bytes += nbytes

    def dropped(self, layer: int, due: int, ready: int, digests_differ: bool, reason: str) -> None:
        self.drops += 1

    def stalled(self, layer: int, seconds: float) -> None:
        self.stalls.append(seconds)


@dataclass(frozen=True, slots=True)
class TurningPlans(Planning):
    """Plans that exchange the experts of `count` slots of each rank, whatever the load: moves that never end.

    Of several ranks each gets all of its experts from the one before it. Which slots follows from the placement alone,
    so that a rank that has missed a plan goes on with the same ones as the others.
    """

    count: int = 1

    def planner(self) -> Planner:
        """A planner for one layer."""

        def plan(load: np.ndarray, current: Placement) -> Plan:
            by_rank = current.slot_to_expert.reshape(current.ranks, -1).copy()
            chosen = (current.digest() + np.arange(self.count)) % by_rank.shape[1]
            by_rank[:, chosen] = np.roll(by_rank[:, chosen], 1, axis=0 if current.ranks > 1 else 1)
            placement = Placement(current.ranks, current.experts, by_rank.ravel())
            return Plan(placement, placement.changed_slots(current), placement.rank_load(load))

        return plan


@dataclass(frozen=True, slots=True)
class ForcedOptions(BalancerOptions):
    """Options of a balancer that moves `forced` slots with every plan."""

    forced: int = 1

    def planning(self, *, compiled: bool = False) -> Planning:
        """How layers are planned."""
        return TurningPlans(count=self.forced)


@dataclass
class Stack:
    """Layers with residual connections and norms between them.

    Attributes:
        x: Hidden states [T, D] that enter, `logits` float32 [L, T, E] the router's, both read anew by each replay.
        tokens: T of each rank.
        graph: All layers, captured; there after `capture`.
    """

    balancer: MoeLoadBalancer
    layers: list[WideEPMoE]
    x: Tensor
    logits: Tensor
    moves: Moves
    tokens: list[int]
    graph: Captured[Tensor] | None = None

    def forward(self) -> Tensor:
        """Hidden states [T, D] that leave."""
        x = self.x
        for layer, logits in zip(self.layers, self.logits, strict=True):
            x = x + layer(torch.nn.functional.rms_norm(x, x.shape[-1:]), logits, self.tokens)
        return x

    def eager(self) -> Tensor:
        """One iteration, launched kernel by kernel."""
        with MoeLoadBalancerIterContext(self.balancer):
            return self.forward()

    def capture(self) -> None:
        """Capture an iteration, after some that warm up."""
        for _ in range(3):
            self.eager()
        self.balancer.device.settle()
        self.graph = self.captured()

    def captured(self) -> Captured[Tensor]:
        """The iteration captured anew, into memory of its own."""
        with self.balancer.capturing():
            return self.balancer.device.capture(self.forward)

    def replay(self, graph: Captured[Tensor] | None = None) -> None:
        """Enqueue one iteration."""
        graph = graph or self.graph
        assert graph is not None
        with MoeLoadBalancerIterContext(self.balancer), self.balancer.replaying():
            graph.replay()

    def updating(self, on: bool) -> None:
        """Let experts move in the coming iterations, or not."""
        self.balancer.set_iter_info(self.balancer.is_dynamic_routing(), on)

    def settle(self) -> None:
        """Return when all is done and noted."""
        self.balancer.device.settle()
        self.balancer.collect()


def build(
    case: Case, layers: int, device: Device, *, updates: int, slots: int, options: BalancerOptions,
    ranks: Ranks = ALONE, statistics: Literal["local_ids", "global_ids"] = "local_ids",
) -> Stack:  # fmt: skip
    """This rank's layers with random weights in bf16, alike for equal cases; `updates` 0 routes statically.

    Each rank has `case.tokens` tokens of its own; `slots` are those of all ranks.
    """
    moves, groups = Moves(), ranks.groups
    balancer = MoeLoadBalancer(
        ranks.rank, ranks.size, updates, device=device, group=groups.setup, options=options, probe=moves
    )
    kinds = (AuxStreamType.MoeShared, AuxStreamType.MoeChunkingOverlap, AuxStreamType.MoeBalancer)
    streams = {kind: device.stream(kind) for kind in kinds}
    place = device.torch_device
    generator = torch.Generator(place).manual_seed(1)
    shape = MoeShape(case.experts, case.top_k, case.hidden, case.intermediate, torch.bfloat16)
    made = []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        stack.enter_context(balancer)
        for _ in range(layers):
            layer = WideEPMoE(
                DefaultMoeRoutingMethod(case.top_k), shape, device, num_slots=slots, aux_stream_dict=streams,
                ep_group=groups.model, statistics_group=groups.statistics, dispatch="allgather", statistics=statistics,
            )  # fmt: skip
            layer.load_weights(_weights(case, generator))
            made.append(layer)
        balancer.finalize_model()
        balancer.set_iter_info(updates > 0, False)
        generator.manual_seed(2 + ranks.rank)
        x = torch.randn(case.tokens, case.hidden, generator=generator, device=place).to(torch.bfloat16)
        logits = torch.randn(layers, case.tokens, case.experts, generator=generator, device=place)
    return Stack(balancer, made, x, logits, moves, [case.tokens] * ranks.size)


def share_weights(stacks: Sequence[Stack]) -> None:
    """Let stacks in which nothing ever moves read the same memory.

    Equal weights elsewhere in memory make a step longer or shorter by more than an idle balancer costs.
    """
    for layers in zip(*(stack.layers for stack in stacks), strict=True):
        largest = max((layer.experts for layer in layers), key=lambda experts: experts.spare)
        for layer in layers:
            for name in layer.experts.names:
                cells = layer.experts.num_slots + layer.experts.spare
                layer.experts.get_parameter(name).data = largest.weight(name)[:cells]


def _weights(case: Case, generator: torch.Generator) -> Callable[[int], dict[str, Tensor]]:
    shapes = {
        "w3_w1": (case.experts, 2 * case.intermediate, case.hidden),
        "w2": (case.experts, case.hidden, case.intermediate),
    }
    drawn = {
        name: torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16).mul_(
            shape[2] ** -0.5
        )
        for name, shape in shapes.items()
    }
    return lambda expert: {name: weight[expert] for name, weight in drawn.items()}
