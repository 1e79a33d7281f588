"""Every routing method once more, one token after the other in float64, to hold the running one against. Slow."""

from __future__ import annotations

import math

import numpy as np

from moe_eplb.moe.routing_rule import RoutingRule

__all__ = ["choose", "misrouted", "scales_of", "slack"]

_BY_PROBABILITY = ("default", "renormalize_naive")
_FLOAT32_RANGE = 80.0
"""exp(-80) / 1024 experts is still a normal float32."""
_ROUNDING = 1e-5


def choose(rule: RoutingRule, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids int64 [T, K] in order of preference, and scales float64 [T, K], for router logits [T, E].

    Of experts that tie the lower ids win. Supplied ids cannot be chosen: ValueError.
    """
    ids = np.empty((len(logits), rule.top_k), dtype=np.int64)
    for token, row in enumerate(logits.tolist()):
        merits = _merits(rule, row)
        ids[token] = _best(merits, rule.top_k, _allowed(rule, merits))
    return ids, scales_of(rule, logits, ids)


def scales_of(rule: RoutingRule, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The scales float64 [T, K] that the experts `ids` [T, K] must have, given router logits [T, E]."""
    scales = np.empty(ids.shape, dtype=np.float64)
    for token, (row, chosen) in enumerate(zip(logits.tolist(), ids.tolist(), strict=True)):
        scales[token] = _scales(rule, row, chosen)
    return scales


def slack(rule: RoutingRule, logits: np.ndarray) -> np.ndarray:
    """How far each token is from another choice, float64 [T]: where it is small, rounding may choose differently.

    The smaller of two distances: from the last expert (or group) that was taken to the best one that was not, in what
    the choice compares: biased scores, or logits. Zero where the last one taken has a probability that float32 cannot
    hold, because all such probabilities are alike.
    """
    found = np.empty(len(logits), dtype=np.float64)
    for token, row in enumerate(logits.tolist()):
        merits = _merits(rule, row)
        falling = sorted((merits[e] for e in _allowed(rule, merits)), reverse=True)
        worth = [_worth(rule, merits, group) for group in range(rule.groups)]
        vanishes = rule.kind in _BY_PROBABILITY and falling[0] - falling[rule.top_k - 1] > _FLOAT32_RANGE
        found[token] = 0.0 if vanishes else min(
            _step(falling, rule.top_k), _step(sorted(worth, reverse=True), rule.top_groups)
        )  # fmt: skip
    return found


def misrouted(rule: RoutingRule, logits: np.ndarray, ids: np.ndarray) -> int:
    """How many tokens have other experts than the rule chooses; those so near to another choice that rounding decides
    may have either. Supplied ids are never wrong."""
    if rule.kind == "supplied" or not len(ids):
        return 0
    differ = (np.sort(choose(rule, logits)[0], axis=1) != np.sort(ids, axis=1)).any(axis=1)
    return int((differ & (slack(rule, logits) > _ROUNDING)).sum())


def _step(falling: list[float], taken: int) -> float:
    return falling[taken - 1] - falling[taken] if taken < len(falling) else math.inf


def _merits(rule: RoutingRule, logits: list[float]) -> list[float]:
    """What the choice compares: logits in place of probabilities, which have the same order but may underflow."""
    if rule.kind == "supplied":
        raise ValueError("supplied expert ids follow no rule")
    if rule.kind != "deepseek_v3":
        return logits
    bias = rule.bias or (0.0,) * len(logits)
    return [_sigmoid(value) + b for value, b in zip(logits, bias, strict=True)]


def _members(rule: RoutingRule, experts: int, group: int) -> range:
    size = experts // rule.groups
    return range(group * size, (group + 1) * size)


def _worth(rule: RoutingRule, merits: list[float], group: int) -> float:
    return sum(sorted((merits[e] for e in _members(rule, len(merits), group)), reverse=True)[:2])


def _allowed(rule: RoutingRule, merits: list[float]) -> list[int]:
    worth = [_worth(rule, merits, group) for group in range(rule.groups)]
    groups = _best(worth, rule.top_groups, list(range(rule.groups)))
    return [expert for group in groups for expert in _members(rule, len(merits), group)]


def _best(values: list[float], count: int, among: list[int]) -> list[int]:
    return sorted(among, key=lambda index: (-values[index], index))[:count]


def _scales(rule: RoutingRule, logits: list[float], chosen: list[int]) -> list[float]:
    if rule.kind == "default":
        return _softmax(logits, [logits[e] for e in chosen])
    if rule.kind == "llama4":
        return [_sigmoid(logits[e]) for e in chosen]
    if rule.kind != "deepseek_v3":
        values = [logits[e] for e in chosen]
        return _softmax(values, values)
    scores = [_sigmoid(logits[e]) for e in chosen]
    total = sum(scores) + 1e-20 if rule.normalize else 1.0
    return [rule.scale * score / total for score in scores]


def _softmax(over: list[float], of: list[float]) -> list[float]:
    """The softmax over the values `over` at the values `of`, which are among them."""
    top = max(over)
    total = math.fsum(math.exp(value - top) for value in over)
    return [math.exp(value - top) / total for value in of]


def _sigmoid(value: float) -> float:
    # Either way around keeps the argument of exp negative, so that it cannot overflow.
    small = math.exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)
