"""Building a model's blocks from its architecture and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core import architecture
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.device import AuxStreamType, Device, get_device
from moe_eplb.models import (
    CheckpointWeights,
    SeededWeights,
    build_block,
    build_blocks,
    make_aux_streams,
    weight_dtype,
)
from tests.support import tiny_models


def _device() -> Device:
    return get_device("cpu", NullSink(), seed=2)


def _compare(folder: Path, model: Any, found: Architecture, **options: Any) -> float:
    """The largest error of the blocks against the model's, relative to the largest output."""
    blocks = build_blocks(found, CheckpointWeights(folder, found), _device(), **options)
    dtype = options.get("dtype") or weight_dtype(found)
    x = torch.randn(len(blocks), 3, 7, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = tiny_models.moe_outputs(model, found.moe_layers, x)
    y = torch.stack([block(inputs) for block, inputs in zip(blocks, x, strict=True)])
    assert y.shape == x.shape
    assert y.dtype == dtype
    return float((y - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("backend", ["wide_ep", "grouped", "fused"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_backend_gives_what_transformers_gives(tmp_path: Path, family: str, backend: str) -> None:
    model = tiny_models.save(family, tmp_path)
    assert _compare(tmp_path, model, architecture.read(tmp_path), backend=backend) <= 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, (0, 2, 3, 4)),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 5}, (1, 3)),
        ("qwen3_moe", {"norm_topk_prob": False}, (1, 3, 5, 7)),
        ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 5]}, (1, 2, 3, 4, 6, 7)),
        ("deepseek_v3", {"norm_topk_prob": False}, (1, 2, 3, 4)),
        ("deepseek_v3", {"first_k_dense_replace": 3}, (3, 4)),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, (1, 2, 3, 4)),
        ("deepseek_v3", {"num_experts_per_tok": 4, "n_shared_experts": 1}, (1, 2, 3, 4)),
        ("mixtral", {"num_experts_per_tok": 1}, (0, 1, 2, 3)),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_configurations_that_change_the_blocks(
    tmp_path: Path, family: str, changes: dict[str, Any], layers: tuple[int, ...]
) -> None:
    model = tiny_models.save(family, tmp_path, **changes)
    found = architecture.read(tmp_path)
    assert found.moe_layers == layers
    assert _compare(tmp_path, model, found) <= 1e-5


def test_no_groups_are_one_group(tmp_path: Path) -> None:
    """transformers cannot run such a model, though its configuration allows for it."""
    model = tiny_models.save("deepseek_v3", tmp_path, n_group=1, topk_group=1)
    config = model.config.to_dict() | {"n_group": None, "topk_group": None}
    assert _compare(tmp_path, model, architecture.parse(config, "here")) <= 1e-5


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_float16_checkpoint_is_computed_in_float32(tmp_path: Path, family: str) -> None:
    model = tiny_models.save(family, tmp_path, dtype=torch.float16)
    found = architecture.read(tmp_path)
    assert (found.dtype, weight_dtype(found)) == ("float16", torch.float32)
    assert _compare(tmp_path, model.float(), found) <= 1e-5


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_bfloat16_checkpoint_stays_one_or_is_converted(tmp_path: Path, family: str) -> None:
    model = tiny_models.save(family, tmp_path, dtype=torch.bfloat16)
    found = architecture.read(tmp_path)
    assert _compare(tmp_path, model, found) <= 2e-2
    assert _compare(tmp_path, model.float(), found, dtype=torch.float32) <= 1e-5


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_router_logits_of_bfloat16_states_are_the_same_to_the_bit(tmp_path: Path, family: str) -> None:
    model = tiny_models.save(family, tmp_path, dtype=torch.bfloat16)
    found = architecture.read(tmp_path)
    x = torch.randn(40, tiny_models.HIDDEN).bfloat16()
    for layer, block in zip(
        found.moe_layers, build_blocks(found, CheckpointWeights(tmp_path, found), _device()), strict=True
    ):
        wanted = model.model.layers[layer].mlp.gate(x)[0]
        assert block.router_logits(x).dtype == wanted.dtype
        assert torch.equal(block.router_logits(x), wanted)


def _seeded(family: str = "qwen2_moe", layers: tuple[int, ...] = (0, 2, 3), shared: int = 16) -> Architecture:
    return Architecture(family, "", 5, layers, 8, 2, 16, 8, shared, "float32", {"method": "renormalize"})


def test_layers_are_those_of_the_model_and_count_from_zero_in_records() -> None:
    found = _seeded()
    weights = SeededWeights(found, 0, torch.float32)
    blocks = build_blocks(found, weights, _device(), layers=[3, 0])
    assert [block.moe.layer_idx for block in blocks] == [0, 1]
    for layer, block in zip((3, 0), blocks, strict=True):
        assert torch.equal(block.router, weights.router(layer))
        assert torch.equal(block.moe.experts.slot_tensor(5, "w2"), weights.expert(layer, 5)["w2"])


def test_one_block_from_tensors_that_are_there() -> None:
    found, device = _seeded(), _device()
    weights = SeededWeights(found, 0, torch.float32)
    block = build_block(found, weights, 2, device, streams=make_aux_streams(found, device), backend="fused")
    x = torch.randn(4, 16)
    assert torch.equal(block(x), build_blocks(found, weights, device, layers=[2], backend="fused")[0](x))


@pytest.mark.parametrize(("updates", "wanted"), [(0, False), (1, True)])
def test_the_balancers_stream_is_made_where_experts_may_move(updates: int, wanted: bool) -> None:
    device = _device()
    with MoeLoadBalancer(0, 1, updates, device=device):
        assert (AuxStreamType.MoeBalancer in make_aux_streams(_seeded(), device)) is wanted
    assert AuxStreamType.MoeBalancer not in make_aux_streams(_seeded(), device)


def test_blocks_share_their_streams_and_join_the_balancer() -> None:
    found, device = _seeded(), _device()
    initial = [None, [0, 0, 1, 2, 3, 4, 5, 6, 7, 7], None]
    balancer = MoeLoadBalancer(0, 1, 3, device=device, options=BalancerOptions())
    with balancer:
        blocks = build_blocks(
            found, SeededWeights(found, 0, torch.float32), device, num_slots=10, initial_slots=initial
        )  # fmt: skip
    balancer.finalize_model()
    try:
        assert [block.moe.layer_load_balancer for block in blocks] == balancer.layers
        assert len({id(block.moe.aux_stream_dict) for block in blocks}) == 1
        assert balancer.layers[1].local_slot_experts() == initial[1]
        assert balancer.layers[0].local_slot_experts() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
        with MoeLoadBalancerIterContext(balancer, True, True):
            for block in blocks:
                block(torch.randn(5, 16))
    finally:
        balancer.shutdown()


class Asked(SeededWeights):
    """Notes for which experts it is asked."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.experts: list[int] = []

    def expert(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        self.experts.append(expert)
        return super().expert(layer, expert)


def test_each_expert_is_asked_for_once_though_it_has_replicas_and_a_host_copy() -> None:
    found, device = _seeded(layers=(0,)), _device()
    weights = Asked(found, 0, torch.float32)
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(commit_delay=2))
    with balancer:
        build_blocks(found, weights, device, num_slots=16)
    balancer.finalize_model()
    balancer.shutdown()
    assert sorted(weights.experts) == list(range(8))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": [1]}, r"layers \[1\] of the model are no MoE layers"),
        ({"layers": [0, 9]}, r"layers \[9\](.|\n)*MoE layers \[0, 2, 3\]"),
        ({"initial_slots": [None]}, "1 for 3 blocks"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options: dict[str, Any], text: str) -> None:
    found = _seeded()
    with pytest.raises(BalancerError, match=rf"E130(.|\n)*{text}"):
        build_blocks(found, SeededWeights(found, 0, torch.float32), _device(), **options)
