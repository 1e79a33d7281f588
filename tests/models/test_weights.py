"""Drawn weights: the same everywhere, each different, of the architecture's shapes."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.core.architecture import Architecture
from moe_eplb.models import SeededWeights


def _architecture(family: str, shared: int = 0) -> Architecture:
    return Architecture(family, "", 4, (1, 2, 3), 6, 2, 32, 16, shared, "float32", {"method": "renormalize"})


def test_shapes_and_dtypes() -> None:
    weights = SeededWeights(_architecture("qwen2_moe", shared=24), 0, torch.bfloat16)
    assert weights.router(1).shape == (6, 32)
    assert {name: tuple(tensor.shape) for name, tensor in weights.expert(1, 0).items()} == {
        "w3_w1": (32, 32),
        "w2": (32, 16),
    }
    shared = weights.shared(1)
    assert shared is not None
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == {
        "w3_w1": (48, 32),
        "w2": (32, 24),
        "gate": (1, 32),
    }
    assert {tensor.dtype for tensor in (weights.router(1), *weights.expert(1, 0).values(), *shared.values())} == {
        torch.bfloat16
    }


def test_only_some_families_have_a_bias_and_a_shared_expert() -> None:
    deepseek = SeededWeights(_architecture("deepseek_v3", shared=16), 0, torch.bfloat16)
    bias, shared = deepseek.router_bias(2), deepseek.shared(2)
    assert bias is not None
    assert shared is not None
    assert (bias.shape, bias.dtype, shared.keys()) == ((6,), torch.float32, {"w3_w1", "w2"})
    mixtral = SeededWeights(_architecture("mixtral"), 0, torch.bfloat16)
    assert (mixtral.router_bias(2), mixtral.shared(2)) == (None, None)


def test_every_tensor_is_drawn_alike_each_time_and_unlike_all_others() -> None:
    first, again = (SeededWeights(_architecture("mixtral"), 3, torch.float32) for _ in range(2))
    drawn = [first.expert(layer, expert)["w2"] for layer in (1, 2) for expert in range(6)]
    # Asked for in another order.
    repeated = [again.expert(layer, expert)["w2"] for layer in (2, 1) for expert in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(drawn, reversed(repeated), strict=True))
    assert len({tensor.numpy().tobytes() for tensor in drawn}) == len(drawn)
    other = SeededWeights(_architecture("mixtral"), 4, torch.float32)
    assert not torch.equal(other.router(1), first.router(1))


@pytest.mark.parametrize("name", ["w3_w1", "w2"])
def test_outputs_keep_the_size_of_their_inputs(name: str) -> None:
    tensor = SeededWeights(_architecture("mixtral"), 0, torch.float32).expert(1, 0)[name]
    assert float(tensor.std()) == pytest.approx(tensor.shape[1] ** -0.5, rel=0.15)
