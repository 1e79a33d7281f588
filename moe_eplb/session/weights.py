"""Seeded master weights by logical expert: what slots are filled from, and what results are proved against."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moe_eplb.core.dtypes import FP8, state_dtype
from moe_eplb.core.scenario import Scenario
from moe_eplb.models.weights import seeded_generator
from moe_eplb.moe.fp8 import in_expert_dtype

__all__ = ["MasterWeights", "expert_dtype", "seeded_generator", "torch_dtype"]

_DRAWN_TOGETHER = 16
"""torch draws so many normal values at a time, and what is left over from others."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, FP8: torch.float8_e4m3fn}


def expert_dtype(name: str) -> torch.dtype:
    """The dtype of the routed experts' matrices where a scenario's is `name`."""
    return _DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of everything else there."""
    return _DTYPES[state_dtype(name)]


class MasterWeights:
    """Weights of the E experts of one layer, the same on every rank: ``w3_w1`` [2I, D] and ``w2`` [D, I] by expert.

    Experts in fp8 have their rows' scales too. The shared expert never is: then it is bfloat16.

    Attributes:
        shared: The same two of the shared expert, or None.
    """

    def __init__(
        self, seed: int, layer: int, *, experts: int, hidden: int, intermediate: int, shared: int = 0,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        generator = seeded_generator("weights", seed, layer)
        self._experts: dict[str, Tensor] = {}
        for name, shape in (("w3_w1", (2 * intermediate, hidden)), ("w2", (hidden, intermediate))):
            self._experts |= _stacked([in_expert_dtype({name: w}, dtype) for w in _drawn(generator, experts, *shape)])
        self.shared: dict[str, Tensor] | None = None
        if shared:
            generator = seeded_generator("shared", seed, layer)
            shared_dtype = torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype
            (up,), (down,) = _drawn(generator, 1, 2 * shared, hidden), _drawn(generator, 1, hidden, shared)
            self.shared = {"w3_w1": up.to(shared_dtype), "w2": down.to(shared_dtype)}

    @classmethod
    def of(cls, scenario: Scenario, layer: int) -> MasterWeights:
        """The weights of a scenario's layer; models that live at the same time share them."""
        model = scenario.model
        key = (
            scenario.seed, layer, model.experts, model.hidden, model.intermediate, model.shared_intermediate,
            model.dtype,
        )  # fmt: skip
        found = _ALIVE.get(key)
        if found is None:
            found = _ALIVE[key] = cls(
                scenario.seed, layer, experts=model.experts, hidden=model.hidden, intermediate=model.intermediate,
                shared=model.shared_intermediate, dtype=expert_dtype(model.dtype),
            )  # fmt: skip
        return found

    def __call__(self, expert: int) -> Mapping[str, Tensor]:
        """The tensors of one expert by name; callers must not write to them."""
        return {name: tensor[expert] for name, tensor in self._experts.items()}


_ALIVE: weakref.WeakValueDictionary[tuple[object, ...], MasterWeights] = weakref.WeakValueDictionary()
"""By what they are drawn from."""


def _drawn(generator: torch.Generator, experts: int, rows: int, columns: int) -> Iterator[Tensor]:
    """Matrices float32 [rows, columns] of experts, one by one where that gives what drawing all at once does."""
    if rows * columns % _DRAWN_TOGETHER:
        yield from torch.randn(experts, rows, columns, generator=generator) * columns**-0.5
    else:
        for _ in range(experts):
            yield torch.randn(rows, columns, generator=generator) * columns**-0.5


def _stacked(experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tensors[name] for tensors in experts]) for name in experts[0]}
