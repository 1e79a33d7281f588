"""Routing methods: which top-k experts a token uses, and with which scales.

Every method maps router logits [T, E] to expert ids int32 [T, K] and scales float32 [T, K]; all arithmetic is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moe_eplb.core.errors import BalancerError

__all__ = [
    "BaseMoeRoutingMethod",
    "DeepSeekV3MoeRoutingMethod",
    "DefaultMoeRoutingMethod",
    "RenormalizeMoeRoutingMethod",
    "SuppliedMoeRoutingMethod",
]


class BaseMoeRoutingMethod(ABC):
    """Chooses `top_k` experts for every token."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    @abstractmethod
    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int32 [T, K], distinct for a token, and scales float32 [T, K] for router logits [T, E]."""


class DefaultMoeRoutingMethod(BaseMoeRoutingMethod):
    """Softmax over all experts, then the K largest probabilities; the scales do not sum to one."""

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        scales, ids = torch.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
        return ids.int(), scales


class RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    """The K largest logits, then softmax over those; the scales sum to one (Mixtral)."""

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        chosen, ids = logits.float().topk(self.top_k, dim=-1)
        return ids.int(), torch.softmax(chosen, dim=-1)


class DeepSeekV3MoeRoutingMethod(BaseMoeRoutingMethod):
    """Sigmoid scores with a correction bias and group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The bias takes part in the choice alone: a group's worth is the sum of its two best biased scores, the best
    `topk_group` groups stay, and the K best biased scores among them win. The scales are the unbiased scores of the
    winners, normalised to sum to one and multiplied by `routed_scaling_factor`.

    Args:
        top_k: K.
        n_group: Number of equal groups that the experts form, in order of id.
        topk_group: Groups that a token may use.
        routed_scaling_factor: Sum of a token's scales.
        e_score_correction_bias: Bias float32 [E].

    Raises:
        BalancerError: E150 when the groups do not divide E or hold fewer than K experts.
    """

    def __init__(
        self,
        top_k: int,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
        e_score_correction_bias: Tensor,
    ) -> None:
        super().__init__(top_k)
        experts = e_score_correction_bias.numel()
        _check_groups(experts, top_k, n_group, topk_group)
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.e_score_correction_bias = e_score_correction_bias.float()
        self._group_size = experts // n_group

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        scores = logits.float().sigmoid()
        biased = scores + self.e_score_correction_bias
        if self.topk_group < self.n_group:
            biased = biased.masked_fill(~self._allowed(biased), float("-inf"))
        ids = biased.topk(self.top_k, dim=-1).indices
        chosen = scores.gather(1, ids)
        return ids.int(), chosen * (self.routed_scaling_factor / (chosen.sum(dim=-1, keepdim=True) + 1e-20))

    def _allowed(self, biased: Tensor) -> Tensor:
        grouped = biased.view(-1, self.n_group, self._group_size)
        worth = grouped.topk(min(2, self._group_size), dim=-1).values.sum(dim=-1)
        best = worth.topk(self.topk_group, dim=-1).indices
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
        return allowed.repeat_interleave(self._group_size, dim=1)


def _check_groups(experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    if n_group < 1 or experts % n_group:
        raise BalancerError(
            "E150",
            "the expert groups are not equal",
            why=f"{experts} experts in {n_group} groups",
            hint="choose a number of groups that divides the number of experts",
        )
    reachable = min(topk_group, n_group) * (experts // n_group)
    if topk_group < 1 or top_k > reachable:
        raise BalancerError(
            "E150",
            "a token's groups hold fewer experts than it needs",
            why=f"top_k {top_k}, {topk_group} of {n_group} groups hold {reachable} experts",
            hint="raise the number of groups a token may use, or lower top_k",
        )


class SuppliedMoeRoutingMethod(BaseMoeRoutingMethod):
    """Expert ids come from outside, for one call at a time; the scales are a softmax of the logits at those ids."""

    def __init__(self, top_k: int) -> None:
        super().__init__(top_k)
        self._ids: Tensor | None = None

    def supply(self, ids: Tensor) -> None:
        """Give the expert ids int32 [T, K] of the next `apply`."""
        self._ids = ids

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids given last and forget them, so that no call can use the ids of another.

        Raises:
            BalancerError: E151 when no ids were supplied, or not [T, K] of them.
        """
        ids, self._ids = self._ids, None
        wanted = (logits.shape[0], self.top_k)
        if ids is None or ids.shape != wanted:
            raise BalancerError(
                "E151",
                "the supplied expert ids do not fit the tokens",
                why=f"wanted shape {wanted}, got {'none' if ids is None else tuple(ids.shape)}",
                hint="call supply(ids) with ids [T, K] before every forward",
            )
        return ids.int(), torch.softmax(logits.float().gather(1, ids.long()), dim=-1)
