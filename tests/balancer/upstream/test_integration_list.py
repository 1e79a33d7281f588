"""TensorRT-LLM's ``test_moe_multi_gpu_eplb`` and ``test_configurable_moe_multi_gpu_eplb`` (multi-rank MoE modules).

Real ranks, real routing from logits, real exchange. As upstream, three iterations beyond the first: by then the
placement differs from the initial one, and the output still is the reference's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_eplb.balancer import MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.moe import RenormalizeMoeRoutingMethod, create_moe
from tests.support.moe_layers import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Watch, expert_weights, reference, tokens_of
from tests.support.ranks import run_ranks

LAYERS, EXTRA_ITERATIONS, TOKENS = 2, 3, 24
SKEW = torch.tensor([0.0, 0.0, 2.0, -1.0, 5.0, -1.0])


def _on_rank(rank: int, size: int, dispatch: str, dtype: torch.dtype) -> dict[str, Any]:
    device = get_device("cpu", NullSink(), seed=2, rank=rank)
    groups = [dist.new_group(list(range(size))) for _ in range(3)]
    balancer = MoeLoadBalancer(rank, size, 2, device=device, group=groups[0])
    with balancer:
        layers = [
            create_moe(
                RenormalizeMoeRoutingMethod(TOP_K), num_experts=EXPERTS, hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE, dtype=dtype, device=device, num_slots=8, ep_group=groups[1],
                statistics_group=groups[2], dispatch=dispatch,
            )
            for _ in range(LAYERS)
        ]  # fmt: skip
    watch = Watch()
    for index, moe in enumerate(layers):
        moe.load_weights(partial(expert_weights, layer=index, dtype=dtype))
        moe.probe = watch
    balancer.finalize_model()
    initial = [layer.placement.slot_to_expert.tolist() for layer in balancer.layers]
    errors, placements = [], []
    try:
        for iteration in range(1 + EXTRA_ITERATIONS):
            with MoeLoadBalancerIterContext(balancer, True, True):
                for index, moe in enumerate(layers):
                    x, logits, _ = tokens_of(rank, TOKENS, step=10 * iteration + index, dtype=dtype)
                    y = moe(x, logits + SKEW.roll(index))
                    assert watch.seen is not None
                    wanted = reference(x, watch.seen[1], watch.seen[2], index)
                    errors.append(float((y.double() - wanted).abs().max() / wanted.abs().max()))
            placements.append([layer.placement.slot_to_expert.tolist() for layer in balancer.layers])
    finally:
        balancer.shutdown()
    return {"initial": initial, "placements": placements, "errors": errors}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
def test_moe_multi_rank_eplb(dispatch: str, dtype: torch.dtype, tolerance: float) -> None:
    """test_moe_multi_gpu_eplb, test_configurable_moe_multi_gpu_eplb."""
    first, second = run_ranks(_on_rank, 2, dispatch, dtype)
    assert first["placements"] == second["placements"]
    assert first["placements"][0] == first["initial"], "nothing has moved in the first iteration"
    for layer in range(LAYERS):
        assert first["placements"][-1][layer] != first["initial"][layer]
    for seen in (first, second):
        assert len(seen["errors"]) == LAYERS * (1 + EXTRA_ITERATIONS)
        assert max(seen["errors"]) <= tolerance
