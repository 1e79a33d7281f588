"""The slow reference, against a formula written once more with Python loops."""

from __future__ import annotations

import math

import pytest
import torch

from moe_eplb.checks.equality import TOLERANCE, compare, reference_output, shared_reference
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.models import SharedExpert
from moe_eplb.moe import BackendName, RenormalizeMoeRoutingMethod, create_moe

GENERATOR = torch.Generator().manual_seed(0)
UP, DOWN = torch.randn(3, 6, 4, generator=GENERATOR), torch.randn(3, 4, 3, generator=GENERATOR)


def master(expert: int) -> dict[str, torch.Tensor]:
    return {"w3_w1": UP[expert], "w2": DOWN[expert]}


def test_reference_by_hand() -> None:
    x = torch.randn(2, 4, generator=GENERATOR)
    ids, scales = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32), torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    y = reference_output(x, ids, scales, master)
    for token in range(2):
        for d in range(4):
            expected = 0.0
            for expert, scale in zip(ids[token].tolist(), scales[token].tolist(), strict=True):
                for i in range(3):
                    up = sum(float(UP[expert, i, c] * x[token, c]) for c in range(4))
                    gate = sum(float(UP[expert, 3 + i, c] * x[token, c]) for c in range(4))
                    hidden = up * gate / (1 + math.exp(-gate))
                    expected += scale * float(DOWN[expert, d, i]) * hidden
            assert float(y[token, d]) == pytest.approx(expected, abs=1e-5)


def test_the_reference_multiplies_rows_by_their_scales() -> None:
    scales = [torch.rand(6, generator=GENERATOR) + 0.5, torch.rand(4, generator=GENERATOR) + 0.5]

    def quantized(expert: int) -> dict[str, torch.Tensor]:
        up, down = UP[expert] / scales[0].unsqueeze(1), DOWN[expert] / scales[1].unsqueeze(1)
        return {"w3_w1": up, "w2": down, "w3_w1_scale": scales[0], "w2_scale": scales[1]}

    x, ids, weight = torch.randn(2, 4, generator=GENERATOR), torch.tensor([[2, 0], [1, 2]]), torch.rand(2, 2)
    torch.testing.assert_close(reference_output(x, ids, weight, quantized), reference_output(x, ids, weight, master))


def test_ratio_is_relative_to_the_largest_element() -> None:
    reference = torch.tensor([[1.0, -10.0]])
    assert compare(reference + torch.tensor([[0.0, 0.01]]), reference).ratio == pytest.approx(0.001, rel=1e-3)
    assert compare(reference, reference).ratio == 0.0


def test_a_sum_is_as_exact_as_its_parts_are() -> None:
    parts = torch.tensor([[4.0, -1.0]]), torch.tensor([[-3.0, 1.0]])
    assert compare(sum(parts) + torch.tensor([[0.07, 0.0]]), *parts).ratio == pytest.approx(0.01)
    assert compare(parts[0], *parts).ratio == pytest.approx(3 / 7)


def test_nan_and_zero_references_never_pass() -> None:
    reference = torch.tensor([[1.0, 2.0]])
    assert compare(torch.tensor([[1.0, float("nan")]]), reference).ratio == math.inf
    assert compare(reference, torch.zeros(1, 2)).ratio == math.inf


def test_no_tokens() -> None:
    empty = torch.empty(0, 4)
    assert (
        compare(reference_output(empty, torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), master), empty).ratio
        == 0
    )


@pytest.mark.parametrize(("size", "top_k", "tokens"), [(16, 1, 1), (16, 2, 4), (64, 2, 1), (128, 2, 4)])
def test_right_fp8_outputs_of_few_tokens_are_right(size: int, top_k: int, tokens: int) -> None:
    """Activations rounded to 3 bits are a third off what exact ones give, in the worst of two thousand such outputs."""
    generator = torch.Generator().manual_seed(0)
    layer = create_moe(
        RenormalizeMoeRoutingMethod(top_k), num_experts=8, hidden_size=size, intermediate_size=size,
        dtype=torch.bfloat16, expert_dtype=torch.float8_e4m3fn, device=get_device("cpu", NullSink()),
    )  # fmt: skip
    draw = [torch.randn(shape, generator=generator) * size**-0.5 for shape in ((8, 2 * size, size), (8, size, size))]
    layer.load_weights(lambda expert: {"w3_w1": draw[0][expert], "w2": draw[1][expert]})
    held, worst = layer.experts.by_slot(), 0.0
    for _ in range(200):
        x = torch.randn(tokens, size, generator=generator).to(torch.bfloat16)
        logits = torch.randn(tokens, 8, generator=generator)
        ids, scales = layer.routing_method.apply(logits)
        worst = max(worst, compare(layer(x, logits), reference_output(x, ids, scales, held.__getitem__)).ratio)
    assert worst <= TOLERANCE[torch.float8_e4m3fn] / 3


@pytest.mark.parametrize("backend", ["wide_ep", "grouped", "fused"])
@pytest.mark.parametrize(("experts", "size", "top_k"), [(8, 8, 8), (8, 8, 2), (4, 16, 1)])
def test_right_bfloat16_outputs_of_tiny_layers_are_right(
    experts: int, size: int, top_k: int, backend: BackendName
) -> None:
    """Without the layer's roundings the reference of 8 columns is 2 % off in the worst of some thousand outputs."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for _ in range(40):
        layer = create_moe(
            RenormalizeMoeRoutingMethod(top_k), num_experts=experts, hidden_size=size, intermediate_size=size,
            dtype=torch.bfloat16, device=get_device("cpu", NullSink()), backend=backend,
        )  # fmt: skip
        weights = [_bfloat16_expert(size, generator) for _ in range(experts)]
        layer.load_weights(weights.__getitem__)
        shared = SharedExpert(**weights[0])
        for _ in range(10):
            x = torch.randn(1, size, generator=generator).to(torch.bfloat16)
            logits = torch.randn(1, experts, generator=generator)
            ids, scales = layer.routing_method.apply(logits)
            worst = max(worst, compare(layer(x, logits), reference_output(x, ids, scales, weights.__getitem__)).ratio)
            worst = max(worst, compare(shared(x), shared_reference(x, weights[0])).ratio)
    assert worst <= TOLERANCE[torch.bfloat16] / 2


def _bfloat16_expert(size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {"w3_w1": (2 * size, size), "w2": (size, size)}
    return {n: (torch.randn(s, generator=generator) * size**-0.5).to(torch.bfloat16) for n, s in shapes.items()}
