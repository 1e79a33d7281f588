"""Inputs, weights, a reference and watchers for tests that run MoE layers."""

from __future__ import annotations

from typing import Any

import torch

from moe_eplb.core.events import Kind
from moe_eplb.core.probe import NullProbe
from moe_eplb.moe.experts import ffn_twin

__all__ = [
    "EXPERTS",
    "HIDDEN",
    "INTERMEDIATE",
    "TOP_K",
    "ListSink",
    "Watch",
    "expert_weights",
    "reference",
    "tokens_of",
]

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 8, 6, 2


def expert_weights(expert: int, layer: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The master weights of one expert of one layer."""
    generator = torch.Generator().manual_seed(1000 * layer + expert)
    w3_w1 = torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) / 4
    return {"w3_w1": w3_w1.to(dtype), "w2": (torch.randn(HIDDEN, INTERMEDIATE, generator=generator) / 4).to(dtype)}


def reference(x: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """Output float64 [T, D] by logical expert, one entry at a time, from master weights."""
    masters = [expert_weights(expert, layer, x.dtype) for expert in range(EXPERTS)]
    w3_w1, w2 = (torch.stack([master[name] for master in masters]) for name in ("w3_w1", "w2"))
    outputs = ffn_twin(x.repeat_interleave(ids.shape[1], dim=0), ids.flatten(), w3_w1, w2)
    return (outputs.view(*ids.shape, -1) * scales.double().unsqueeze(2)).sum(dim=1) if len(x) else outputs


def tokens_of(
    rank: int, tokens: int, *, step: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, D], router logits [T, E] and skewed expert ids int32 [T, K] of a rank in a step."""
    generator = torch.Generator().manual_seed(7919 * step + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    skew = torch.tensor([-1.0, 0.0, 1.5, 0.0, 3.0, -1.0])
    ids = (torch.randn(tokens, EXPERTS, generator=generator) + skew).topk(TOP_K, dim=1).indices.int()
    return x, logits, ids


class Watch(NullProbe):
    """Keeps what a probe sees of the last forward."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, int, int]] = []
        self.routed_slots: list[list[int]] = []
        self.seen: tuple[Any, Any, Any, Any] | None = None
        self.commits = 0

    def routed(self, layer: int, expert_ids: Any, slot_ids: Any) -> None:
        self.routed_slots = slot_ids.tolist()

    def processed(self, layer: int, source_rank: Any, token: Any, k: Any, slot: Any) -> None:
        self.entries = list(zip(source_rank.tolist(), token.tolist(), k.tolist(), slot.tolist(), strict=True))

    def output(self, layer: int, x: Any, router_logits: Any, expert_ids: Any, scales: Any, y: Any) -> None:
        self.seen = (x, expert_ids, scales, y)

    def committed(self, layer: int, taken: int, placement: Any, changed: Any, moved_bytes: int) -> None:
        self.commits += 1


class ListSink:
    """Keeps (kind, stream, a) of every record in the order of their starts."""

    def __init__(self) -> None:
        self.records: list[tuple[Kind, int, int]] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self.records.append((kind, stream, a))
        return len(self.records) - 1

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        return None

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        self.records.append((kind, stream, a))
