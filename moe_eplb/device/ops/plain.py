"""The device operations in plain torch: exact, without requirements, and what the fast ones are held against."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["combine", "histogram", "permute", "route", "swiglu"]

BLOCK = 1024
"""Entries per block; the round-robin over replicas starts again in each (TensorRT-LLM's routing kernel)."""


def histogram(ids: Tensor, counts: Tensor) -> None:
    """Add the histogram of `ids` (any integer shape) to `counts` int32 [E] in place; ids outside [0, E) are ignored."""
    experts = counts.numel()
    flat = ids.reshape(-1).to(torch.int64)
    inside = (flat >= 0) & (flat < experts)
    # One bin more takes what belongs to nobody, so that no size depends on the ids.
    found = torch.bincount(torch.where(inside, flat, experts), minlength=experts + 1)
    counts.add_(found[:experts].to(torch.int32))


def route(ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int) -> Tensor:
    """Slot ids int32 [T, K] of the replicas that entries take.

    Entry i of the flattened ids lies in block b = i // 1024 and takes replica ``(seen + b + offset) mod count`` of its
    expert, where `seen` counts earlier entries of the expert in the block.

    Args:
        ids: Expert ids [T, K]; those outside [0, E) get `invalid`.
        count, start: int32 [E], replicas of an expert and where they begin in `slots`.
        slots: int32 [P], slot ids grouped by expert.
        offset: Where the round-robin begins, such as the source rank.
        invalid: What stands for no slot.
    """
    experts = count.numel()
    flat = ids.reshape(-1).to(torch.int64)
    inside = (flat >= 0) & (flat < experts)
    expert = torch.where(inside, flat, 0)
    block = torch.arange(flat.numel(), device=ids.device) // BLOCK
    seen = _seen_before(torch.where(inside, block * experts + expert, -1))
    replica = (seen + block + offset) % count[expert]
    slot = slots[start[expert] + replica]
    return torch.where(inside, slot, invalid).to(torch.int32).reshape(ids.shape)


def permute(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Where each entry goes when entries are grouped by slot, in order of arrival within a slot.

    Args:
        slots: int [M, K], the local slot of each entry, outside [0, S) for none.
        num_slots: S.

    Returns:
        position: int32 [M, K], from 0; -1 for entries without a slot.
        offs: int32 [S], the end of each slot's entries.
    """
    flat = slots.reshape(-1).to(torch.int64)
    inside = (flat >= 0) & (flat < num_slots)
    key = torch.where(inside, flat, num_slots)
    order = torch.argsort(key, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=slots.device)
    offs = torch.bincount(key, minlength=num_slots + 1)[:num_slots].cumsum(0, dtype=torch.int32)
    return torch.where(inside, position, -1).to(torch.int32).reshape(slots.shape), offs


def swiglu(rows: Tensor) -> Tensor:
    """``silu(gate) * up`` [N, I] of rows [N, 2I] that hold up before gate; computed in float32."""
    up, gate = rows.to(torch.float32).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(rows.dtype)


def combine(output: Tensor, position: Tensor, scales: Tensor) -> Tensor:
    """Weighted sum float32 [M, D] over k, in order of k, of the entries' outputs.

    Args:
        output: [N, D], by position.
        position: int32 [M, K]; -1 adds nothing.
        scales: float32 [M, K].
    """
    total = torch.zeros(position.shape[0], output.shape[1], dtype=torch.float32, device=output.device)
    for k in range(position.shape[1]):
        here = position[:, k] >= 0
        rows = output[position[:, k].clamp(min=0).long()].to(torch.float32) if len(output) else total
        total = total + torch.where(here.unsqueeze(1), rows * scales[:, k].unsqueeze(1), 0.0)
    return total


def _seen_before(key: Tensor) -> Tensor:
    """For each entry, how many earlier entries have the same key."""
    order = torch.argsort(key, stable=True)
    ordered = key[order]
    position = torch.arange(key.numel(), device=key.device)
    first = torch.searchsorted(ordered, ordered)
    seen = torch.empty_like(position)
    seen[order] = position - first
    return seen
