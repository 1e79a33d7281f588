"""Routing methods against per-token implementations written independently."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.device.ops import Choice
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


def _logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


def _largest(values: list[float], count: int, among: list[int]) -> list[int]:
    return sorted(among, key=lambda e: -values[e])[:count]


def _softmax(values: list[float]) -> list[float]:
    exps = [math.exp(v - max(values)) for v in values]
    return [e / sum(exps) for e in exps]


def _naive_deepseek(
    logits: list[float], bias: list[float], top_k: int, groups: int, top_groups: int, scale: float
) -> dict[int, float]:
    scores = [1 / (1 + math.exp(-v)) for v in logits]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    worth = [sum(sorted((biased[e] for e in m), reverse=True)[:2]) for m in members]
    allowed = [e for g in _largest(worth, top_groups, list(range(groups))) for e in members[g]]
    chosen = _largest(biased, top_k, allowed)
    return {e: scale * scores[e] / sum(scores[c] for c in chosen) for e in chosen}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.sampled_from([1, 2, 4, 8]), negative=st.booleans(), data=st.data())
def test_deepseek_v3_equals_the_naive_implementation(
    seed: int, groups: int, negative: bool, data: st.DataObject
) -> None:
    experts = 16
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(6, top_groups * experts // groups)))
    logits = _logits(5, experts, seed)
    bias = _logits(1, experts, seed + 1)[0] - (5.0 if negative else 0.0)
    ids, scales = DeepSeekV3MoeRoutingMethod(top_k, groups, top_groups, 2.5, bias).apply(logits)
    assert ids.dtype == torch.int32
    assert scales.dtype == torch.float32
    for token in range(5):
        wanted = _naive_deepseek(logits[token].tolist(), bias.tolist(), top_k, groups, top_groups, 2.5)
        got = dict(zip(ids[token].tolist(), scales[token].tolist(), strict=True))
        assert got == pytest.approx(wanted, rel=1e-5)


def test_deepseek_v3_bias_changes_the_choice_but_not_the_scales() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    ids, scales = DeepSeekV3MoeRoutingMethod(2, 1, 1, 1.0, bias).apply(logits)
    assert ids.tolist() == [[3, 0]]
    unbiased = torch.sigmoid(torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(scales[0], unbiased / unbiased.sum())


@pytest.mark.parametrize(("top_k", "n_group", "topk_group"), [(2, 3, 1), (5, 4, 2), (1, 0, 1), (1, 4, 0)])
def test_deepseek_v3_rejects_groups_that_cannot_work(top_k: int, n_group: int, topk_group: int) -> None:
    with pytest.raises(BalancerError, match="E150"):
        DeepSeekV3MoeRoutingMethod(top_k, n_group, topk_group, 1.0, torch.zeros(8))


def test_default_takes_the_softmax_of_all_experts() -> None:
    logits = _logits(4, 8, 0)
    ids, scales = DefaultMoeRoutingMethod(3).apply(logits)
    for token, values in enumerate(logits.tolist()):
        chosen = _largest(values, 3, list(range(8)))
        assert ids[token].tolist() == chosen
        assert scales[token].tolist() == pytest.approx([_softmax(values)[e] for e in chosen], rel=1e-5)


def test_renormalize_takes_the_softmax_of_the_chosen() -> None:
    logits = _logits(4, 8, 1)
    ids, scales = RenormalizeMoeRoutingMethod(3).apply(logits)
    for token, values in enumerate(logits.tolist()):
        chosen = _largest(values, 3, list(range(8)))
        assert ids[token].tolist() == chosen
        assert scales[token].tolist() == pytest.approx(_softmax([values[e] for e in chosen]), rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        DefaultMoeRoutingMethod(2),
        RenormalizeMoeRoutingMethod(2),
        DeepSeekV3MoeRoutingMethod(2, 4, 2, 1.0, torch.zeros(8)),
    ],
)
def test_bfloat16_logits_give_float32_scales_and_no_token_gives_none(
    method: DefaultMoeRoutingMethod | RenormalizeMoeRoutingMethod | DeepSeekV3MoeRoutingMethod,
) -> None:
    ids, scales = method.apply(_logits(3, 8, 2).bfloat16())
    assert (ids.dtype, scales.dtype) == (torch.int32, torch.float32)
    ids, scales = method.apply(torch.zeros(0, 8))
    assert (ids.shape, scales.shape) == ((0, 2), (0, 2))


def test_supplied_ids_are_used_once() -> None:
    method = SuppliedMoeRoutingMethod(2)
    logits = _logits(2, 4, 3)
    given_ids = torch.tensor([[0, 3], [2, 1]])
    method.supply(given_ids)
    ids, scales = method.apply(logits)
    assert ids.tolist() == given_ids.tolist()
    assert scales[0].tolist() == pytest.approx(_softmax([logits[0, 0].item(), logits[0, 3].item()]), rel=1e-5)
    with pytest.raises(BalancerError, match="E151"):
        method.apply(logits)


def test_supplied_ids_of_other_tokens_are_refused() -> None:
    method = SuppliedMoeRoutingMethod(2)
    method.supply(torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(BalancerError, match=r"wanted shape \(2, 2\), got \(3, 2\)"):
        method.begin(2)


def test_chunks_share_out_the_supplied_ids() -> None:
    method = SuppliedMoeRoutingMethod(2)
    given_ids = torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.int32)
    method.supply(given_ids)
    method.begin(3)
    parts = [method.apply(_logits(rows, 4, 3))[0] for rows in (2, 0, 1)]
    assert torch.cat(parts).tolist() == given_ids.tolist()
    with pytest.raises(BalancerError, match=r"wanted shape \(1, 2\), got \(0, 2\)"):
        method.apply(_logits(1, 4, 3))


def test_renormalize_naive_divides_probabilities_by_their_sum() -> None:
    logits = _logits(4, 8, 4)
    ids, scales = RenormalizeNaiveMoeRoutingMethod(3).apply(logits)
    for token, values in enumerate(logits.tolist()):
        probabilities = _softmax(values)
        chosen = _largest(values, 3, list(range(8)))
        total = sum(probabilities[e] for e in chosen)
        assert ids[token].tolist() == chosen
        assert scales[token].tolist() == pytest.approx([probabilities[e] / total for e in chosen], rel=1e-5)


def test_llama4_takes_the_sigmoid_of_the_one_best_logit() -> None:
    ids, scales = Llama4MoeRoutingMethod().apply(torch.tensor([[0.0, 2.0, 1.0], [-1.0, -2.0, -3.0]]))
    assert ids.tolist() == [[1], [0]]
    assert scales.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.e)])


def test_llama4_rejects_more_than_one_expert() -> None:
    with pytest.raises(BalancerError, match=r"E150(.|\n)*top_k 2"):
        Llama4MoeRoutingMethod(2)


def test_deepseek_v3_without_normalisation_scales_the_scores_themselves() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    ids, scales = DeepSeekV3MoeRoutingMethod(2, 1, 1, 2.5, torch.zeros(4), norm_topk_prob=False).apply(logits)
    assert ids.tolist() == [[0, 1]]
    torch.testing.assert_close(scales, 2.5 * torch.sigmoid(logits[:, :2]))


def test_methods_tell_their_rule() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0])
    deepseek = DeepSeekV3MoeRoutingMethod(2, 2, 1, 2.5, bias, norm_topk_prob=False)
    wanted = RoutingRule("deepseek_v3", 2, 2, 1, 2.5, False, (0.5, -0.25, 0.0, 1.0))
    assert deepseek.rule == wanted
    kinds = {
        DefaultMoeRoutingMethod: "default",
        RenormalizeMoeRoutingMethod: "renormalize",
        RenormalizeNaiveMoeRoutingMethod: "renormalize_naive",
        SuppliedMoeRoutingMethod: "supplied",
    }
    assert {method(3).rule for method in kinds} == {RoutingRule(kind, 3) for kind in kinds.values()}  # type: ignore[arg-type]
    assert Llama4MoeRoutingMethod().rule == RoutingRule("llama4", 1)


def _theirs(family: str, logits: torch.Tensor, top_k: int, normalize: bool, bias: torch.Tensor) -> torch.Tensor:
    """Ids that transformers' own router chooses; its weight is such that the hidden states are the logits."""
    from transformers import DeepseekV3Config, Qwen3MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    experts = logits.shape[1]
    sizes = {"hidden_size": experts, "num_experts_per_tok": top_k, "norm_topk_prob": normalize}
    if family == "qwen3_moe":
        router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=experts))
    else:
        router = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, n_routed_experts=experts, n_group=4, topk_group=2))
        router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        return router(logits)[2]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_ids_are_those_that_transformers_chooses(spread: float, normalize: bool) -> None:
    logits, bias = _logits(2000, 16, 5) * spread, _logits(1, 16, 6)[0] / 8
    naive = RenormalizeNaiveMoeRoutingMethod if normalize else DefaultMoeRoutingMethod
    deepseek = DeepSeekV3MoeRoutingMethod(4, 4, 2, 1.0, bias, norm_topk_prob=normalize)
    for family, method in (("qwen3_moe", naive(4)), ("deepseek_v3", deepseek)):
        theirs = _theirs(family, logits, 4, normalize, bias)
        assert torch.equal(method.apply(logits)[0].sort().values, theirs.int().sort().values)


_ON_A_GPU: list[tuple[Choice, Callable[[int], BaseMoeRoutingMethod], int]] = [
    *(("default", DefaultMoeRoutingMethod, k) for k in (1, 4, 16)),
    *(("renormalize", RenormalizeMoeRoutingMethod, k) for k in (1, 4, 16)),
    *(("renormalize_naive", RenormalizeNaiveMoeRoutingMethod, k) for k in (1, 4, 16)),
    ("sigmoid", Llama4MoeRoutingMethod, 1),
]


@pytest.mark.parametrize(("choice", "make", "k"), _ON_A_GPU)
def test_what_a_gpu_computes_is_the_same_method(
    choice: Choice, make: Callable[[int], BaseMoeRoutingMethod], k: int
) -> None:
    """On a GPU a method asks for `ops.top_k`, whose plain form stands in for it here."""
    logits = _logits(300, 16, 9)
    ids, scales = ops.top_k(logits, k, choice)
    wanted_ids, wanted = make(k).apply(logits)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scales, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("choice", "make", "k"), _ON_A_GPU)
def test_methods_on_a_gpu_choose_like_those_on_a_cpu(
    choice: Choice, make: Callable[[int], BaseMoeRoutingMethod], k: int
) -> None:
    logits = _logits(300, 128, 10)
    ids, scales = make(k).apply(logits.cuda())
    wanted_ids, wanted = make(k).apply(logits)
    assert (ids.cpu() == wanted_ids).float().mean() > 0.999, "rounding may change a close choice"
    torch.testing.assert_close(scales.cpu(), wanted, rtol=1e-4, atol=1e-6)


def test_supplied_ids_that_are_no_experts_are_handed_on() -> None:
    """Whoever routes ignores them."""
    method = SuppliedMoeRoutingMethod(2)
    method.supply(torch.tensor([[0, -1], [7, 3]], dtype=torch.int32))
    method.begin(2)
    ids, scales = method.apply(torch.randn(2, 4))
    assert ids.tolist() == [[0, -1], [7, 3]]
    assert torch.isfinite(scales).all()
