"""Sizes of a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["MoeShape"]


@dataclass(frozen=True, slots=True)
class MoeShape:
    """E experts, of which a token uses K; hidden size D, intermediate size I, and the dtype of weights and states."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
