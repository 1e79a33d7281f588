"""Seeded master weights by logical expert: what slots are filled from, and what results are proved against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moe_eplb.core.scenario import Scenario
from moe_eplb.models.weights import seeded_generator

__all__ = ["MasterWeights", "seeded_generator", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a scenario calls `name`."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


class MasterWeights:
    """Weights of the E experts of one layer, the same on every rank: ``w3_w1`` [2I, D] and ``w2`` [D, I] by expert.

    Attributes:
        shared: The same two of the shared expert, or None.
    """

    def __init__(
        self, seed: int, layer: int, *, experts: int, hidden: int, intermediate: int, shared: int = 0,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        generator = seeded_generator("weights", seed, layer)
        up, down = _drawn(generator, experts, hidden, intermediate)
        self._up, self._down = up.to(dtype), down.to(dtype)
        self.shared: dict[str, Tensor] | None = None
        if shared:
            up, down = _drawn(seeded_generator("shared", seed, layer), 1, hidden, shared)
            self.shared = {"w3_w1": up[0].to(dtype), "w2": down[0].to(dtype)}

    @classmethod
    def of(cls, scenario: Scenario, layer: int) -> MasterWeights:
        """The weights of a scenario's layer."""
        model = scenario.model
        return cls(
            scenario.seed, layer, experts=model.experts, hidden=model.hidden, intermediate=model.intermediate,
            shared=model.shared_intermediate, dtype=torch_dtype(model.dtype),
        )  # fmt: skip

    def __call__(self, expert: int) -> Mapping[str, Tensor]:
        """The tensors of one expert by name; callers must not write to them."""
        return {"w3_w1": self._up[expert], "w2": self._down[expert]}


def _drawn(generator: torch.Generator, experts: int, hidden: int, intermediate: int) -> tuple[Tensor, Tensor]:
    up = torch.randn(experts, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate, generator=generator) * intermediate**-0.5
    return up, down
