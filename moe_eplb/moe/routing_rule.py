"""What a routing method says about itself, in plain values, so that others can compute the same without its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["RoutingKind", "RoutingRule"]

RoutingKind = Literal["default", "renormalize", "renormalize_naive", "deepseek_v3", "llama4", "supplied"]


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """A routing method and its parameters; all but `kind` and `top_k` belong to ``deepseek_v3``.

    Args:
        kind: Which method, see the classes of `moe_eplb.moe.routing`.
        top_k: K.
        groups, top_groups: Equal groups of experts, and how many of them a token may use.
        scale: What the scales are multiplied by.
        normalize: Whether a token's scales are divided by their sum first.
        bias: Of each expert, for the choice alone; empty for none.
    """

    kind: RoutingKind
    top_k: int
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    normalize: bool = True
    bias: tuple[float, ...] = ()
