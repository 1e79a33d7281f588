"""Families: the names, routing methods and streams that they state."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.core import architecture
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.events import NullSink
from moe_eplb.device import AuxStreamType, get_device
from moe_eplb.models import FAMILIES
from moe_eplb.moe import RoutingRule
from tests.support import tiny_models

SHARED, CHUNKS = AuxStreamType.MoeShared, AuxStreamType.MoeChunkingOverlap
ATTENTION, BALANCER = AuxStreamType.Attention, AuxStreamType.MoeBalancer


def _parsed(family: str, **changes: object) -> Architecture:
    return architecture.parse(tiny_models.make(family, **changes).config.to_dict(), family)


def test_they_are_those_whose_configuration_can_be_read() -> None:
    assert FAMILIES.keys() == architecture.FAMILIES.keys() == set(tiny_models.FAMILIES)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("mixtral", {CHUNKS}),
        ("qwen3_moe", {CHUNKS}),
        ("qwen2_moe", {SHARED, CHUNKS}),
        ("deepseek_v3", {ATTENTION, SHARED, CHUNKS}),
    ],
)
def test_streams(family: str, kinds: set[AuxStreamType]) -> None:
    device = get_device("cpu", NullSink())
    assert FAMILIES[family].aux_stream_dict(device, balanced=False).keys() == kinds
    streams = FAMILIES[family].aux_stream_dict(device, balanced=True)
    assert streams.keys() == kinds | {BALANCER}
    others = [stream for kind, stream in streams.items() if kind is not BALANCER]
    assert streams[BALANCER] not in others
    # DeepSeek-V3 alone lets two of them share a stream.
    assert len(set(others)) == len(others) - (family == "deepseek_v3")
    if family == "deepseek_v3":
        assert streams[ATTENTION] is streams[SHARED]


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("mixtral", {}, "renormalize"),
        ("qwen2_moe", {}, "default"),
        ("qwen2_moe", {"norm_topk_prob": True}, "renormalize_naive"),
        ("qwen3_moe", {"norm_topk_prob": True}, "renormalize_naive"),
        ("qwen3_moe", {"norm_topk_prob": False}, "default"),
    ],
)
def test_softmax_routing(family: str, changes: dict[str, object], kind: str) -> None:
    method = FAMILIES[family].routing_method(_parsed(family, **changes), None)
    assert method.rule == RoutingRule(kind, tiny_models.TOP_K)  # type: ignore[arg-type]


def test_deepseek_v3_routing() -> None:
    found = _parsed("deepseek_v3", norm_topk_prob=False, routed_scaling_factor=1.5)
    bias = torch.arange(8.0)
    rule = RoutingRule("deepseek_v3", 2, groups=4, top_groups=2, scale=1.5, normalize=False, bias=tuple(range(8)))
    assert FAMILIES["deepseek_v3"].routing_method(found, bias).rule == rule
    assert FAMILIES["deepseek_v3"].routing_method(found, None).rule.bias == (0.0,) * 8


def test_only_deepseek_v3_computes_its_router_in_float32() -> None:
    assert {name: family.router_dtype for name, family in FAMILIES.items()} == {
        "mixtral": None,
        "qwen2_moe": None,
        "qwen3_moe": None,
        "deepseek_v3": torch.float32,
    }
