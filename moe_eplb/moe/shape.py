"""Sizes and dtypes of a MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.ops import FP8

__all__ = ["MoeShape"]


@dataclass(frozen=True, slots=True)
class MoeShape:
    """E experts, of which a token uses K; hidden size D, intermediate size I.

    `dtype` is that of hidden states, and of the experts' weights too where `expert_dtype` is left out.

    Raises:
        BalancerError: E187 for experts of another dtype than the states', unless they are fp8 and those bfloat16.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    expert_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        experts = self.weight_dtype
        fits = experts is self.dtype or (experts, self.dtype) == (FP8, torch.bfloat16)
        if not fits or self.dtype is FP8:
            raise BalancerError(
                "E187", f"experts of {experts} cannot work on hidden states of {self.dtype}",
                hint=f"use one dtype for both, or dtype torch.bfloat16 with expert_dtype {FP8}",
            )  # fmt: skip

    def require_inputs(self, x: Tensor, router_logits: Tensor) -> None:
        """Refuse inputs of a forward that are not hidden states [T, D] of `dtype` and logits [T, E].

        They would be computed with all the same: rows travel as words, whatever those stand for.

        Raises:
            BalancerError: E217.
        """
        tokens = x.shape[0] if x.dim() else 0
        if (
            x.shape == (tokens, self.hidden_size)
            and x.dtype is self.dtype
            and router_logits.shape == (tokens, self.num_experts)
        ):
            return
        raise BalancerError(
            "E217", "these inputs do not fit the layer",
            why=f"hidden states {x.dtype} {tuple(x.shape)} and logits {tuple(router_logits.shape)}; it takes "
            f"{self.dtype} [T, {self.hidden_size}] and [T, {self.num_experts}]",
            hint="flatten batches, cast the states, and give the logits of all experts and of no others",
        )  # fmt: skip

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the experts' matrices."""
        return self.dtype if self.expert_dtype is None else self.expert_dtype
