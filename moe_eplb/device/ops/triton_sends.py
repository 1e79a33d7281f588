"""Rows that are sent only to the ranks that need them, as Triton kernels; see `moe_eplb.device.ops.plain_sends`."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain_rows import require_columns
from moe_eplb.device.ops.plain_sends import MARKS, Arrived
from moe_eplb.device.ops.triton_rows import word_of
from moe_eplb.device.sanitizer import declares

__all__ = ["add_returned", "arrive", "order_sends", "send_rows"]

_TOKENS, _WORDS, _ROWS, _COLUMNS = 1024, 1024, 32, 1024


def order_sends(slot_ids: Tensor, *, ranks: int, slots_per_rank: int, block: int) -> tuple[Tensor, Tensor]:
    """See `plain_sends.order_sends`."""
    tokens, top_k = slot_ids.shape
    place = torch.empty(ranks, tokens, dtype=torch.int32, device=slot_ids.device)
    token_at = torch.empty(ranks * block, dtype=torch.int32, device=slot_ids.device)
    # A power of two, so that few kernels are compiled.
    tiles = triton.next_power_of_2(triton.cdiv(block, _TOKENS))
    _order_sends[(ranks,)](slot_ids.contiguous(), place, token_at, tokens, slots_per_rank, block, top_k, tiles, _TOKENS)
    return place, token_at


def send_rows(columns: Sequence[Tensor], token_at: Tensor, rows: Tensor, *, rank: int) -> None:
    """See `plain_sends.send_rows`."""
    require_columns(columns, rows, MARKS)
    if not rows.numel():
        return
    first, second, third = (column.contiguous() for column in columns)
    widths = [column.shape[1] for column in columns]
    _send_rows[(rows.shape[0], triton.cdiv(sum(widths) + MARKS, _WORDS))](
        first, second, third, token_at, rows, *widths, rows.shape[1], rank, _WORDS
    )


def arrive(scales: Tensor, integers: Tensor, *, rank: int, block: int, slots_per_rank: int) -> Arrived:
    """See `plain_sends.arrive`."""
    rows, top_k = scales.shape
    slots = torch.empty(rows, top_k, dtype=torch.int32, device=scales.device)
    checked = torch.empty(rows, top_k, dtype=torch.float32, device=scales.device)
    token = torch.empty(rows, dtype=torch.int32, device=scales.device)
    marks = torch.empty(rows, 2, dtype=torch.int32, device=scales.device)
    if rows:
        _arrive[(triton.cdiv(rows, _ROWS),)](
            scales, integers, slots, checked, token, marks, rows, scales.stride(0), integers.stride(0), rank, block,
            slots_per_rank, top_k, triton.next_power_of_2(top_k), _ROWS,
        )  # fmt: skip
    return Arrived(slots, checked, token, marks)


def add_returned(hidden: Tensor, marks: Tensor, place: Tensor, *, rank: int, block: int) -> Tensor:
    """See `plain_sends.add_returned`."""
    (ranks, tokens), width = place.shape, hidden.shape[1]
    total = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    if total.numel():
        _add_returned[(tokens, triton.cdiv(width, _COLUMNS))](
            hidden, marks, place, total, tokens, width, hidden.stride(0), marks.stride(0), rank, block, ranks, _COLUMNS
        )
    return total


@triton.jit
def _needed(slot_ids, token, tokens, first, per_rank, top_k: tl.constexpr):
    """int32 [tile]: 1 where the rank whose slots begin at `first` holds one of the token's."""
    needed = token < 0
    for k in tl.static_range(top_k):
        slot = tl.load(slot_ids + token * top_k + k, mask=token < tokens, other=-1)
        needed |= (slot >= first) & (slot < first + per_rank)
    return needed.to(tl.int32)


@declares(writes=["place", "token_at"])
@triton.jit(do_not_specialize=["tokens", "most"])
def _order_sends(
    slot_ids, place, token_at, tokens, per_rank, most, top_k: tl.constexpr, tiles: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    rank = tl.program_id(0)
    lines = token_at + rank.to(tl.int64) * most
    count = rank * 0
    for turn in range(tiles):
        token = turn * tile + tl.arange(0, tile)
        needed = _needed(slot_ids, token, tokens, rank * per_rank, per_rank, top_k)
        at = count + tl.cumsum(needed, 0) - 1
        here = needed > 0
        tl.store(place + rank.to(tl.int64) * tokens + token, tl.where(here, at, -1), mask=token < tokens)
        tl.store(lines + at, token, mask=here)
        count += tl.sum(needed)
    for turn in range(tiles):
        line = turn * tile + tl.arange(0, tile)
        tl.store(lines + line, line * 0 - 1, mask=(line >= count) & (line < most))


@declares(writes=["rows"])
@triton.jit
def _send_rows(
    first, second, third, token_at, rows, width1, width2, width3, words, rank, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_at + row).to(tl.int64)
    used = token >= 0
    word = tl.program_id(1) * block + tl.arange(0, block)
    word2 = word - width1
    word3 = word2 - width2
    mark = word3 - width3
    value = tl.full([block], -1, dtype=tl.int32)
    value = word_of(first, value, token, word, width1, used)
    value = word_of(second, value, token, word2, width2, used)
    value = word_of(third, value, token, word3, width3, used)
    value = tl.where(used & (mark == 0), token.to(tl.int32), value)
    value = tl.where(used & (mark == 1), rank, value)
    value = tl.where(used & (mark == 2), row.to(tl.int32), value)
    tl.store(rows + row * words + word, value, mask=(mark < 3) & (used | (word3 >= 0)))


@declares(writes=["slots", "checked", "token", "marks"])
@triton.jit(do_not_specialize=["rows"])
def _arrive(
    scales, integers, slots, checked, token, marks, rows, scale_stride, stride, rank, most, per_rank,
    top_k: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    real = row < rows
    at = row.to(tl.int64)
    mark = integers + at * stride + top_k
    source = tl.load(mark + 1, mask=real, other=-1)
    line = tl.load(mark + 2, mask=real, other=-1)
    peer = row // most
    used = line != -1
    right = (source == peer) & (line == rank * most + row - peer * most)
    tl.store(token + row, tl.load(mark, mask=real, other=0), mask=real)
    tl.store(marks + 2 * at, source, mask=real)
    tl.store(marks + 2 * at + 1, line, mask=real)
    k = tl.arange(0, columns)
    mask = real[:, None] & (k < top_k)[None, :]
    slot = tl.load(integers + at[:, None] * stride + k[None, :], mask=mask, other=0) - rank * per_rank
    slot = tl.where(used[:, None], tl.where(right[:, None], slot, 0), -1)
    scale = tl.load(scales + at[:, None] * scale_stride + k[None, :], mask=mask, other=0.0)
    tl.store(slots + at[:, None] * top_k + k[None, :], slot, mask=mask)
    tl.store(checked + at[:, None] * top_k + k[None, :], tl.where(right[:, None], scale, float("nan")), mask=mask)


@declares(writes=["total"])
@triton.jit(do_not_specialize=["tokens"])
def _add_returned(
    hidden, marks, place, total, tokens, width, stride, mark_stride, rank, most, ranks: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    value = tl.zeros([block], dtype=tl.float32)
    for receiver in range(ranks):
        at = tl.load(place + receiver * tokens + token).to(tl.int64)
        sent = at >= 0
        line = receiver * most + at
        source = tl.load(marks + line * mark_stride, mask=sent, other=0)
        number = tl.load(marks + line * mark_stride + 1, mask=sent, other=0)
        right = (source == rank) & (number == line)
        row = tl.load(hidden + line * stride + column, mask=mask & sent, other=0.0).to(tl.float32)
        value += tl.where(sent, tl.where(right, row, float("nan")), 0.0)
    tl.store(total + token * width + column, value.to(total.dtype.element_ty), mask=mask)
