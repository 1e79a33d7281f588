"""Master weights: the same values however they are drawn."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.moe.fp8 import in_expert_dtype
from moe_eplb.session.weights import MasterWeights, seeded_generator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 16), (48, 8), (16, 3), (5, 3), (2, 4)])
def test_experts_are_drawn_one_by_one_as_if_at_once(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    weights = MasterWeights(7, 2, experts=5, hidden=hidden, intermediate=intermediate, shared=6, dtype=dtype)
    generator = seeded_generator("weights", 7, 2)
    up = torch.randn(5, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(5, hidden, intermediate, generator=generator) * intermediate**-0.5
    wanted = in_expert_dtype({"w3_w1": up, "w2": down}, dtype)
    for expert in range(5):
        found = weights(expert)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(tensor.float(), wanted[name][expert].float())
    generator = seeded_generator("shared", 7, 2)
    assert weights.shared is not None
    up = torch.randn(12, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(hidden, 6, generator=generator) * 6**-0.5
    assert torch.equal(weights.shared["w3_w1"].float(), up.to(weights.shared["w3_w1"].dtype).float())
    assert torch.equal(weights.shared["w2"].float(), down.to(weights.shared["w2"].dtype).float())
