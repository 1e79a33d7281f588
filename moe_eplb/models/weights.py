"""Where a model's weights come from: what every source gives, and the one that draws them."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.models.families import FAMILIES

__all__ = ["SeededWeights", "Weights", "seeded_generator"]

_BIAS_SPREAD = 0.1


class Weights(Protocol):
    """Weights of a model's MoE blocks by number of the layer in the model. Callers must not write to what they get."""

    def router(self, layer: int) -> Tensor:
        """[E, D]."""

    def router_bias(self, layer: int) -> Tensor | None:
        """[E], None where the family has none."""

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """``w3_w1`` [2I, D], the rows of w3 (up) before those of w1 (gate), and ``w2`` [D, I]."""

    def shared(self, layer: int) -> dict[str, Tensor] | None:
        """The same of the shared expert, with ``gate`` [1, D] where it has one; None without shared expert."""


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A generator whose draws depend on nothing but `parts`."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class SeededWeights:
    """`Weights` drawn when asked for, the same on every rank and every time, so that nobody has to hold them all.

    Args:
        architecture: Sizes.
        seed: Of all draws.
        dtype: Of what is given; drawn in float32.
    """

    def __init__(self, architecture: Architecture, seed: int, dtype: torch.dtype) -> None:
        self._architecture, self._seed, self._dtype = architecture, seed, dtype
        self._names = FAMILIES[architecture.family].tensors

    def router(self, layer: int) -> Tensor:
        """See `Weights`."""
        sizes = self._architecture
        return self._drawn((sizes.experts, sizes.hidden), layer, "router")

    def router_bias(self, layer: int) -> Tensor | None:
        """See `Weights`; float32."""
        if self._names.router_bias is None:
            return None
        generator = seeded_generator(self._seed, layer, "router_bias")
        return torch.randn(self._architecture.experts, generator=generator) * _BIAS_SPREAD

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """See `Weights`."""
        return self._feed_forward(self._architecture.intermediate, layer, f"expert {expert}")

    def shared(self, layer: int) -> dict[str, Tensor] | None:
        """See `Weights`."""
        sizes = self._architecture
        if not sizes.shared_intermediate:
            return None
        weights = self._feed_forward(sizes.shared_intermediate, layer, "shared")
        if self._names.shared_gate is not None:
            weights["gate"] = self._drawn((1, sizes.hidden), layer, "shared", "gate")
        return weights

    def _feed_forward(self, intermediate: int, layer: int, owner: str) -> dict[str, Tensor]:
        hidden = self._architecture.hidden
        return {
            "w3_w1": self._drawn((2 * intermediate, hidden), layer, owner, "w3_w1"),
            "w2": self._drawn((hidden, intermediate), layer, owner, "w2"),
        }

    def _drawn(self, shape: tuple[int, int], *name: int | str) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=seeded_generator(self._seed, *name))
        return (drawn / math.sqrt(shape[1])).to(self._dtype)
