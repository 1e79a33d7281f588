"""The model of a scenario, whichever of the two kinds it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from moe_eplb.balancer import MoeLoadBalancer
from moe_eplb.core.evidence import EvidenceWriter
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device
from moe_eplb.models import MoeBlock
from moe_eplb.session.groups import Groups
from moe_eplb.session.master import Master

__all__ = ["Model", "make_model"]


class Model(Protocol):
    """One rank's model."""

    @property
    def blocks(self) -> Sequence[MoeBlock]:
        """The MoE blocks in order of their layers."""

    @property
    def masters(self) -> Sequence[Master]:
        """For each block."""

    def prefetch(self, iterations: Iterable[int]) -> None:
        """Draw the tokens of coming iterations now, so that `load` of them takes no time."""

    def load(self, iteration: int) -> Callable[[], Tensor]:
        """Prepare this rank's tokens of an iteration, before it begins; what is returned runs one forward on them."""

    def finish(self, evidence: EvidenceWriter) -> None:
        """Write down what only the model knows, after the last iteration."""


def make_model(
    scenario: Scenario, rank: int, device: Device, groups: Groups, balancer: MoeLoadBalancer | None = None
) -> Model:
    """The model of one rank. Must be called inside the balancer's context where there is one."""
    if scenario.model.part == "whole":
        from moe_eplb.session.generation import GeneratingModel  # needs a package that other scenarios do not

        return GeneratingModel(scenario, rank, device, groups)
    from moe_eplb.session.stack import MoeStack

    stack = MoeStack(scenario, rank, device, groups)
    if scenario.execution == "eager":
        return stack
    from moe_eplb.session.graphed import GraphedStack

    return GraphedStack(stack, device, balancer)
