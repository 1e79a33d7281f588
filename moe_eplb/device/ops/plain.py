"""The device operations in plain torch: exact, without requirements, and what the fast ones are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_eplb.device.ops.plain_ffn import grouped_product, grouped_swiglu, swiglu, swiglu_float32
from moe_eplb.device.ops.plain_parts import Parts, parts_of
from moe_eplb.device.ops.plain_rows import require_columns
from moe_eplb.device.ops.plain_sends import add_returned, arrive, order_sends, send_rows

__all__ = [
    "FP8",
    "Choice",
    "add_blocks",
    "add_returned",
    "arrive",
    "combine",
    "entry_at",
    "grouped_product",
    "grouped_swiglu",
    "histogram",
    "order_sends",
    "pack_rows",
    "permute",
    "permute_in_parts",
    "permute_rows",
    "permute_rows_fp8",
    "quantize_rows",
    "route",
    "send_rows",
    "swiglu",
    "swiglu_fp8",
    "top_k",
]

Choice = Literal["default", "renormalize_naive", "renormalize", "sigmoid"]
"""How `top_k` chooses and scales."""

FP8 = torch.float8_e4m3fn
"""What rows are quantised to: 4 bits of exponent, 3 of mantissa, no infinity."""

LARGEST = 448.0
"""The largest value of `FP8`, which the largest element of a row becomes."""

LEAST_MAX = 2.0**-60
"""Rows whose elements are all smaller are scaled as if one were this large, so that no scale is zero or subnormal."""

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


def route(
    ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int, counts: Tensor | None = None
) -> Tensor:
    """Slot ids int32 [T, K] of the replicas that entries take.

    Entry i of the flattened ids lies in block b = i // 1024 and takes replica ``(seen + b + offset) mod count`` of its
    expert, where `seen` counts earlier entries of the expert in the block.

    Args:
        ids: Expert ids [T, K]; those outside [0, E) get `invalid`.
        count, start: int32 [E], replicas of an expert and where they begin in `slots`.
        slots: int32 [P], slot ids grouped by expert.
        offset: Where the round-robin begins, such as the source rank.
        invalid: What stands for no slot.
        counts: int32 [E] to which the histogram of `ids` is added, too.
    """
    if counts is not None:
        histogram(ids, counts)
    experts = count.numel()
    flat = ids.reshape(-1).to(torch.int64)
    inside = (flat >= 0) & (flat < experts)
    expert = torch.where(inside, flat, 0)
    block = torch.arange(flat.numel(), device=ids.device) // BLOCK
    seen = _seen_before(torch.where(inside, block * experts + expert, -1))
    replica = (seen + block + offset) % count[expert]
    slot = slots[start[expert] + replica]
    return torch.where(inside, slot, invalid).to(torch.int32).reshape(ids.shape)


def permute(slots: Tensor, groups: int, cells: Tensor | None = None, first_slot: int = 0) -> tuple[Tensor, Tensor]:
    """Where each entry goes when entries are grouped, in order of arrival within a group.

    Args:
        slots: int [M, K], the slot of each entry, outside [first_slot, first_slot + S) for none.
        groups: G, the number of groups.
        cells: int32 [S], the group of each slot; None when slot first_slot + s is group s, and then S is G.
        first_slot: The lowest slot that has a group.

    Returns:
        position: int32 [M, K], from 0; -1 for entries without a slot.
        offs: int32 [G], the end of each group's entries.
    """
    key = _groups_of(slots.reshape(-1) - first_slot, groups, cells)
    order = torch.argsort(key, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=slots.device)
    offs = torch.bincount(key, minlength=groups + 1)[:groups].cumsum(0, dtype=torch.int32)
    return torch.where(key < groups, position, -1).to(torch.int32).reshape(slots.shape), offs


def permute_rows(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`permute`, and the hidden states [M, D] (rows may be strided) copied to where their entries go.

    Args:
        hidden, slots, groups, cells, first_slot: As for `permute`.
        entries: N, how many entries have a slot; None when nobody knows, and then N is M * K.
        copying: Called before the rows are copied: what is submitted then runs beside that.

    Returns:
        rows: [N, D]; rows after the last group's end hold anything.
        position, offs: As for `permute`.
    """
    position, offs = permute(slots, groups, cells, first_slot)
    source = _sources(position, slots.numel() if entries is None else entries)
    copying()
    return hidden[source], position, offs


def permute_in_parts(
    hidden: Tensor, slots: Tensor, cells: Tensor, rows: int, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Parts]:  # fmt: skip
    """`permute_rows` with slots as groups, and their parts, for products of few rows.

    Args:
        hidden, slots, entries, copying, first_slot: As for `permute_rows`.
        cells: int32 [S], where each slot's weights are.
        rows: Of a part.
    """
    grouped, position, offs = permute_rows(hidden, slots, len(cells), None, entries, copying, first_slot)
    return grouped, position, offs, parts_of(offs, cells, rows, len(grouped))


def permute_rows_fp8(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`permute_rows` of the hidden states as `quantize_rows` gives them; each is quantised once for all its entries.

    Returns:
        rows: `FP8` [N, D] and scale: float32 [N]; both hold anything after the last group's end.
        position, offs: As for `permute`.
    """
    position, offs = permute(slots, groups, cells, first_slot)
    source = _sources(position, slots.numel() if entries is None else entries)
    copying()
    rows, scale = quantize_rows(hidden)
    return rows[source], scale[source], position, offs


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] as `FP8` [..., D] and float32 scales [...], with ``row = fp8 * scale`` but for rounding.

    A row's scale is its largest magnitude divided by `LARGEST`; a row of zeros stays one. Where an element is infinite
    or undefined the scale is not finite either, so that no product with the row can be.
    """
    values = rows.to(torch.float32)
    largest = values.abs().amax(dim=-1).clamp(min=LEAST_MAX) if rows.shape[-1] else values.new_zeros(rows.shape[:-1])
    # Not `LARGEST / largest`, which torch rounds twice.
    inverse = torch.full_like(largest, LARGEST) / largest
    return (values * inverse.unsqueeze(-1)).to(FP8), largest * (1 / LARGEST)


def swiglu_fp8(rows: Tensor, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`swiglu` quantised from float32 by `quantize_rows`: `FP8` [N, I] and scales float32 [N].

    With `offs` int32 [G] rows after its last end are nobody's, and what comes of them holds anything.
    """
    return quantize_rows(swiglu_float32(rows))


def combine(output: Tensor, position: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weighted sum [M, D] over k of the entries' outputs; added in float32, in order of k, and rounded once to `dtype`.

    Args:
        output: [N, D], by position.
        position: int32 [M, K]; -1 adds nothing.
        scales: float32 [M, K]; rows may be strided.
        dtype: Of the result.
    """
    total = torch.zeros(position.shape[0], output.shape[1], dtype=torch.float32, device=output.device)
    for k in range(position.shape[1]):
        here = position[:, k] >= 0
        rows = output[position[:, k].clamp(min=0).long()].to(torch.float32) if len(output) else total
        total = total + torch.where(here.unsqueeze(1), rows * scales[:, k].unsqueeze(1), 0.0)
    return total.to(dtype)


def add_blocks(blocks: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Sum [T, D] over R of the first T rows of blocks [R, B, D], in float32, in order of R, rounded once to `dtype`."""
    total = torch.zeros(tokens, blocks.shape[2], dtype=torch.float32, device=blocks.device)
    for block in blocks:
        total = total + block[:tokens].to(torch.float32)
    return total.to(dtype)


def pack_rows(columns: Sequence[Tensor], rows: Tensor) -> None:
    """Write columns int32 [T, W_i], at most four, side by side into rows int32 [B, W]; all other words become -1.

    Raises:
        ValueError: When they do not fit.
    """
    require_columns(columns, rows)
    tokens, begin = columns[0].shape[0], 0
    rows.fill_(-1)
    for column in columns:
        rows[:tokens, begin : begin + column.shape[1]] = column
        begin += column.shape[1]


def top_k(logits: Tensor, k: int, method: Choice) -> tuple[Tensor, Tensor]:
    """The K best experts of each token, best first, the lower id first where two are equal; all in float32.

    Args:
        logits: Router logits [T, E].
        k: K, at most E.
        method: "default": the largest of a softmax over all, which are the scales too. "renormalize_naive": the same,
            divided by their sum. "renormalize": the largest logits, and a softmax over those. "sigmoid": the largest
            logits, and the sigmoid of each.

    Returns:
        Expert ids int32 [T, K] and scales float32 [T, K].
    """
    merit = logits.to(torch.float32)
    if method in ("default", "renormalize_naive"):
        merit = torch.softmax(merit, dim=-1)
    best, ids = (part[:, :k] for part in torch.sort(merit, dim=-1, descending=True, stable=True))
    if method == "renormalize_naive":
        best = best / best.sum(dim=-1, keepdim=True)
    elif method == "renormalize":
        best = torch.softmax(best, dim=-1)
    elif method == "sigmoid":
        best = best.sigmoid()
    return ids.to(torch.int32), best.contiguous()


def entry_at(position: Tensor, size: int) -> Tensor:
    """int64 [size]: number of the entry at each place, as `position` int32 [M, K] says; 0 where none stands."""
    flat = position.flatten().long()
    # Entries without a slot all go to one place behind the others, so that no size depends on the contents.
    source = torch.zeros(size + 1, dtype=torch.int64, device=position.device)
    source.scatter_(0, torch.where(flat >= 0, flat, size), torch.arange(flat.numel(), device=position.device))
    return source[:size]


def _sources(position: Tensor, size: int) -> Tensor:
    """int64 [size]: the row whose entry stands at each place, 0 where none does."""
    return entry_at(position, size).div(max(1, position.shape[1]), rounding_mode="floor")


def _groups_of(flat: Tensor, groups: int, cells: Tensor | None) -> Tensor:
    """int64 [N]: the group of each entry, G for none."""
    slots = groups if cells is None else cells.numel()
    inside = (flat >= 0) & (flat < slots)
    group = torch.where(inside, flat, 0).to(torch.int64)
    if cells is not None:
        group = cells[group].to(torch.int64)
        inside = inside & (group >= 0) & (group < groups)
    return torch.where(inside, group, groups)


def _seen_before(key: Tensor) -> Tensor:
    """For each entry, how many earlier entries have the same key."""
    order = torch.argsort(key, stable=True)
    ordered = key[order]
    position = torch.arange(key.numel(), device=key.device)
    first = torch.searchsorted(ordered, ordered)
    seen = torch.empty_like(position)
    seen[order] = position - first
    return seen
