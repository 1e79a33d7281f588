"""The routing twin against the running methods, and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_eplb.checks.routing_twin import choose, scales_of, slack
from moe_eplb.moe import (
    BaseMoeRoutingMethod,
    DeepSeekV3MoeRoutingMethod,
    DefaultMoeRoutingMethod,
    Llama4MoeRoutingMethod,
    RenormalizeMoeRoutingMethod,
    RenormalizeNaiveMoeRoutingMethod,
    RoutingRule,
    SuppliedMoeRoutingMethod,
)

EXPERTS, TOKENS = 16, 12
SIMPLE = [DefaultMoeRoutingMethod, RenormalizeMoeRoutingMethod, RenormalizeNaiveMoeRoutingMethod]


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_alike(method: BaseMoeRoutingMethod, logits: torch.Tensor) -> int:
    """Hold both against each other; returns for how many tokens the choice could be compared."""
    ids, scales = (tensor.numpy() for tensor in method.apply(logits))
    exact = logits.double().numpy()
    np.testing.assert_allclose(scales, scales_of(method.rule, exact, ids), rtol=2e-5, atol=1e-30)
    clear = slack(method.rule, exact) > 1e-5
    twin_ids, twin_scales = choose(method.rule, exact)
    for token in np.nonzero(clear)[0]:
        got = dict(zip(ids[token].tolist(), scales[token].tolist(), strict=True))
        wanted = dict(zip(twin_ids[token].tolist(), twin_scales[token].tolist(), strict=True))
        assert got == pytest.approx(wanted, rel=2e-5, abs=1e-30)
    return int(clear.sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), kind=st.sampled_from(SIMPLE), top_k=st.integers(1, EXPERTS),
    spread=st.sampled_from([0.1, 2.0, 15.0]), bfloat16=st.booleans(),
)  # fmt: skip
def test_softmax_methods(
    seed: int, kind: type[BaseMoeRoutingMethod], top_k: int, spread: float, bfloat16: bool
) -> None:
    logits = _draw(seed, TOKENS, EXPERTS) * spread
    compared = _assert_alike(kind(top_k), logits.bfloat16() if bfloat16 else logits)
    # Rounded to bfloat16, logits do tie; otherwise hardly ever.
    assert compared >= (0 if bfloat16 else TOKENS - 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 2.0, 60.0]))
def test_llama4(seed: int, spread: float) -> None:
    assert _assert_alike(Llama4MoeRoutingMethod(), _draw(seed, TOKENS, EXPERTS) * spread) >= TOKENS - 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), groups=st.sampled_from([1, 2, 4, 8, 16]), top_groups=st.integers(1, 16),
    top_k=st.integers(1, 8), scale=st.sampled_from([1.0, 2.5]), normalize=st.booleans(), shift=st.sampled_from([0, -5]),
)  # fmt: skip
def test_deepseek_v3(
    seed: int, groups: int, top_groups: int, top_k: int, scale: float, normalize: bool, shift: int
) -> None:
    assume(top_groups <= groups and top_k <= top_groups * EXPERTS // groups)
    bias = _draw(seed + 1, EXPERTS) * 0.3 + shift
    method = DeepSeekV3MoeRoutingMethod(top_k, groups, top_groups, scale, bias, norm_topk_prob=normalize)
    assert _assert_alike(method, _draw(seed, TOKENS, EXPERTS) * 2) >= TOKENS - 2


def test_supplied_ids_have_scales_but_no_choice() -> None:
    method = SuppliedMoeRoutingMethod(3)
    logits = _draw(0, TOKENS, EXPERTS)
    method.supply(torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(TOKENS)]))
    ids, scales = method.apply(logits)
    np.testing.assert_allclose(scales, scales_of(method.rule, logits.double().numpy(), ids.numpy()), rtol=2e-5)
    with pytest.raises(ValueError, match="no rule"):
        choose(method.rule, logits.numpy())


def test_scales_by_hand() -> None:
    logits, ids = np.log([[1.0, 2.0, 5.0]]), np.array([[2, 1]])
    wanted = {"default": [5 / 8, 2 / 8], "renormalize": [5 / 7, 2 / 7], "renormalize_naive": [5 / 7, 2 / 7]}
    for kind, scales in wanted.items():
        assert scales_of(RoutingRule(kind, 2), logits, ids)[0] == pytest.approx(scales)  # type: ignore[arg-type]
    sigmoids = [5 / 6, 2 / 3]
    plain = RoutingRule("deepseek_v3", 2, scale=2.0, normalize=False)
    assert scales_of(plain, logits, ids)[0] == pytest.approx([2 * s for s in sigmoids])
    summed = RoutingRule("deepseek_v3", 2, scale=2.0)
    assert scales_of(summed, logits, ids)[0] == pytest.approx([2 * s / sum(sigmoids) for s in sigmoids])
    assert scales_of(RoutingRule("llama4", 1), logits, ids[:, :1])[0] == pytest.approx(sigmoids[:1])


def test_groups_and_bias_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.6, 0.5]])
    logits = np.log(scores / (1 - scores))
    rule = RoutingRule("deepseek_v3", 1, groups=2, top_groups=1)
    # The second group is worth 1.1, so the best expert of all is out of reach.
    assert choose(rule, logits)[0].tolist() == [[2]]
    assert slack(rule, logits) == pytest.approx([0.1])
    biased = RoutingRule("deepseek_v3", 1, groups=2, top_groups=1, bias=(0.0, 0.4, 0.0, 0.0))
    ids, scales = choose(biased, logits)
    assert ids.tolist() == [[0]]
    assert scales.tolist() == [[pytest.approx(1.0)]]


def test_slack_is_zero_for_ties_and_for_probabilities_that_vanish() -> None:
    logits = np.array([[1.0, 0.0, 0.0], [0.0, -200.0, -201.0]])
    assert slack(RoutingRule("default", 2), logits).tolist() == [0.0, 0.0]
    assert slack(RoutingRule("renormalize", 2), logits).tolist() == [0.0, 1.0]
    assert slack(RoutingRule("renormalize", 3), logits).tolist() == [math.inf, math.inf]


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    logits = np.array([[800.0, 790.0, -800.0]])
    assert scales_of(RoutingRule("renormalize", 2), logits, np.array([[0, 1]]))[0] == pytest.approx(
        [1 / (1 + math.exp(-10)), 1 / (1 + math.exp(10))]
    )
    assert scales_of(RoutingRule("llama4", 1), logits, np.array([[2]]))[0] == pytest.approx([0.0], abs=1e-300)
