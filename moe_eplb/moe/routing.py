"""Routing methods: which top-k experts a token uses, and with which scales.

Every method maps router logits [T, E] to expert ids int32 [T, K] and scales float32 [T, K]; all arithmetic is float32.
On a GPU most are one kernel, in which the lower of equal experts wins. On a CPU torch chooses among equals, as it does
for the published models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.moe.routing_rule import RoutingRule

__all__ = [
    "BaseMoeRoutingMethod",
    "DeepSeekV3MoeRoutingMethod",
    "DefaultMoeRoutingMethod",
    "Llama4MoeRoutingMethod",
    "RenormalizeMoeRoutingMethod",
    "RenormalizeNaiveMoeRoutingMethod",
    "SuppliedMoeRoutingMethod",
]


class BaseMoeRoutingMethod(ABC):
    """Chooses `top_k` experts for every token."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    @property
    @abstractmethod
    def rule(self) -> RoutingRule:
        """The method and its parameters, in plain values."""

    def begin(self, tokens: int) -> None:
        """A forward of T tokens begins, in one or more calls of `apply`; most methods need no such notice."""
        return None

    @abstractmethod
    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids int32 [T, K], distinct for a token, and scales float32 [T, K] for router logits [T, E]."""


class DefaultMoeRoutingMethod(BaseMoeRoutingMethod):
    """Softmax over all experts, then the K largest probabilities; the scales do not sum to one."""

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule("default", self.top_k)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if logits.is_cuda:
            return ops.top_k(logits, self.top_k, "default")
        scales, ids = torch.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
        return ids.int(), scales


class RenormalizeMoeRoutingMethod(BaseMoeRoutingMethod):
    """The K largest logits, then softmax over those; the scales sum to one (Mixtral)."""

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule("renormalize", self.top_k)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if logits.is_cuda:
            return ops.top_k(logits, self.top_k, "renormalize")
        chosen, ids = logits.float().topk(self.top_k, dim=-1)
        return ids.int(), torch.softmax(chosen, dim=-1)


class RenormalizeNaiveMoeRoutingMethod(BaseMoeRoutingMethod):
    """Softmax over all experts, the K largest probabilities, divided by their sum (Qwen3-MoE with norm_topk_prob).

    In exact arithmetic this is `RenormalizeMoeRoutingMethod`. Rounded probabilities can tie where logits do not, so
    only the same order of operations makes the same choice as the published models.
    """

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule("renormalize_naive", self.top_k)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if logits.is_cuda:
            return ops.top_k(logits, self.top_k, "renormalize_naive")
        chosen, ids = torch.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
        return ids.int(), chosen / chosen.sum(dim=-1, keepdim=True)


class Llama4MoeRoutingMethod(BaseMoeRoutingMethod):
    """The one expert with the largest logit; the scale is the logit's sigmoid (Llama 4).

    Raises:
        BalancerError: E150 when K is not one.
    """

    def __init__(self, top_k: int = 1) -> None:
        if top_k != 1:
            raise BalancerError(
                "E150",
                "this routing method chooses one expert for a token",
                why=f"top_k {top_k}",
                hint="use top_k 1, or another routing method",
            )
        super().__init__(top_k)

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule("llama4", self.top_k)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if logits.is_cuda:
            return ops.top_k(logits, self.top_k, "sigmoid")
        chosen, ids = logits.float().topk(1, dim=-1)
        return ids.int(), chosen.sigmoid()


class DeepSeekV3MoeRoutingMethod(BaseMoeRoutingMethod):
    """Sigmoid scores with a correction bias and group-limited choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    The bias takes part in the choice alone: a group's worth is the sum of its two best biased scores, the best
    `topk_group` groups stay, and the K best biased scores among them win. The scales are the unbiased scores of the
    winners, divided by their sum if `norm_topk_prob`, and multiplied by `routed_scaling_factor`.

    Args:
        top_k: K.
        n_group: Number of equal groups that the experts form, in order of id.
        topk_group: Groups that a token may use.
        routed_scaling_factor: What the scales are multiplied by; their sum if they are normalised.
        e_score_correction_bias: Bias float32 [E].
        norm_topk_prob: Whether a token's scales are divided by their sum.

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
        *,
        norm_topk_prob: bool = True,
    ) -> None:
        super().__init__(top_k)
        experts = e_score_correction_bias.numel()
        _check_groups(experts, top_k, n_group, topk_group)
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.e_score_correction_bias = e_score_correction_bias.float()
        self.norm_topk_prob = norm_topk_prob
        self._group_size = experts // n_group

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule(
            "deepseek_v3",
            self.top_k,
            groups=self.n_group,
            top_groups=self.topk_group,
            scale=self.routed_scaling_factor,
            normalize=self.norm_topk_prob,
            bias=tuple(self.e_score_correction_bias.tolist()),
        )

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        scores = logits.float().sigmoid()
        biased = scores + self.e_score_correction_bias
        if self.topk_group < self.n_group:
            biased = biased.masked_fill(~self._allowed(biased), float("-inf"))
        ids = biased.topk(self.top_k, dim=-1).indices
        chosen = scores.gather(1, ids)
        if self.norm_topk_prob:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
        return ids.int(), chosen * self.routed_scaling_factor

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
    """Expert ids come from outside, for one forward at a time; the scales are a softmax of the logits at those ids."""

    def __init__(self, top_k: int) -> None:
        super().__init__(top_k)
        self._left: Tensor | None = None

    @property
    def rule(self) -> RoutingRule:
        """See the base class."""
        return RoutingRule("supplied", self.top_k)

    def supply(self, ids: Tensor) -> None:
        """Give the expert ids int32 [T, K] of the next forward, whose chunks take their rows one after the other."""
        self._left = ids

    def begin(self, tokens: int) -> None:
        """See the base class.

        Raises:
            BalancerError: E151 when no ids were supplied, or not [T, K] of them.
        """
        if self._left is None or self._left.shape != (tokens, self.top_k):
            raise self._unfit(tokens)

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next rows and forget them, so that no call can use the ids of another.

        Raises:
            BalancerError: E151 when too few are left.
        """
        left, rows = self._left, logits.shape[0]
        if left is None or len(left) < rows:
            raise self._unfit(rows)
        ids, self._left = left[:rows], left[rows:]
        # Ids outside [0, E) are nobody's; whatever scale they get multiplies nothing.
        known = ids.long().clamp(0, logits.shape[1] - 1)
        return ids.int(), torch.softmax(logits.float().gather(1, known), dim=-1)

    def _unfit(self, rows: int) -> BalancerError:
        left, self._left = self._left, None
        return BalancerError(
            "E151",
            "the supplied expert ids do not fit the tokens",
            why=f"wanted shape {(rows, self.top_k)}, got {'none' if left is None else tuple(left.shape)}",
            hint="call supply(ids) with ids [T, K] of all tokens before every forward",
        )
