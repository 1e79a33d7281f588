"""Rows that are sent only to the ranks that need them, as Triton kernels; see `moe_eplb.device.ops.plain_sends`.

A program looks at the counts of all ranks by itself, a few words that stay in the cache, so that nothing else has to be
launched for offsets.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain_sends import MARKS, Arrived
from moe_eplb.device.sanitizer import declares

__all__ = ["add_returned", "arrive", "order_sends", "send_rows"]

_TOKENS, _WORDS, _ROWS, _COLUMNS = 1024, 1024, 32, 1024


def order_sends(slot_ids: Tensor, counts: Tensor, *, slots_per_rank: int, block: int) -> tuple[Tensor, Tensor]:
    """See `plain_sends.order_sends`."""
    size, (tokens, top_k) = counts.numel(), slot_ids.shape
    position = torch.empty(size, tokens, dtype=torch.int32, device=slot_ids.device)
    token_at = torch.empty(size * block, dtype=torch.int32, device=slot_ids.device)
    slot_ids = slot_ids.contiguous()
    # A power of two, so that few kernels are compiled.
    tiles = triton.next_power_of_2(triton.cdiv(tokens, _TOKENS))
    _count_sends[(size,)](slot_ids, counts, tokens, slots_per_rank, top_k, tiles, _TOKENS)
    _order_sends[(size,)](
        slot_ids,
        counts,
        position,
        token_at,
        tokens,
        slots_per_rank,
        top_k,
        triton.next_power_of_2(size),
        tiles,
        _TOKENS,
    )
    return position, token_at


def send_rows(
    columns: Sequence[Tensor], token_at: Tensor, counts: Tensor, rows: Tensor, *, rank: int, block: int
) -> None:
    """See `plain_sends.send_rows`."""
    if not rows.numel():
        return
    first, second, third = (column.contiguous() for column in columns)
    widths = [column.shape[1] for column in columns]
    _send_rows[(rows.shape[0], triton.cdiv(sum(widths) + MARKS, _WORDS))](
        first, second, third, token_at, counts, rows, *widths, rows.shape[1], rank, block, counts.numel(), _WORDS
    )


def arrive(scales: Tensor, integers: Tensor, counts: Tensor, *, rank: int, block: int, slots_per_rank: int) -> Arrived:
    """See `plain_sends.arrive`."""
    rows, top_k = scales.shape
    slots = torch.empty(rows, top_k, dtype=torch.int32, device=scales.device)
    checked = torch.empty(rows, top_k, dtype=torch.float32, device=scales.device)
    token = torch.empty(rows, dtype=torch.int32, device=scales.device)
    marks = torch.empty(rows, 2, dtype=torch.int32, device=scales.device)
    if rows:
        _arrive[(triton.cdiv(rows, _ROWS),)](
            scales, integers, counts, slots, checked, token, marks, rows, scales.stride(0), integers.stride(0), rank,
            block, slots_per_rank, counts.numel(), top_k, triton.next_power_of_2(top_k), _ROWS,
        )  # fmt: skip
    return Arrived(slots, checked, token, marks)


def add_returned(hidden: Tensor, marks: Tensor, position: Tensor, counts: Tensor, *, rank: int, block: int) -> Tensor:
    """See `plain_sends.add_returned`."""
    tokens, width = position.shape[1], hidden.shape[1]
    total = torch.empty(tokens, width, dtype=hidden.dtype, device=hidden.device)
    if total.numel():
        _add_returned[(tokens, triton.cdiv(width, _COLUMNS))](
            hidden, marks, position, counts, total, tokens, width, hidden.stride(0), marks.stride(0), rank, block,
            counts.numel(), _COLUMNS,
        )  # fmt: skip
    return total


@triton.jit
def _needed(slot_ids, token, tokens, first, per_rank, top_k: tl.constexpr):
    """int32 [tile]: 1 where the rank whose slots begin at `first` holds one of the token's."""
    needed = token < 0
    for k in tl.static_range(top_k):
        slot = tl.load(slot_ids + token * top_k + k, mask=token < tokens, other=-1)
        needed |= (slot >= first) & (slot < first + per_rank)
    return needed.to(tl.int32)


@declares(writes=["counts"])
@triton.jit(do_not_specialize=["tokens"])
def _count_sends(slot_ids, counts, tokens, per_rank, top_k: tl.constexpr, tiles: tl.constexpr, tile: tl.constexpr):
    rank = tl.program_id(0)
    found = tl.zeros([tile], dtype=tl.int32)
    for turn in range(tiles):
        found += _needed(slot_ids, turn * tile + tl.arange(0, tile), tokens, rank * per_rank, per_rank, top_k)
    tl.store(counts + rank, tl.sum(found).to(tl.int64))


@declares(writes=["position", "token_at"])
@triton.jit(do_not_specialize=["tokens"])
def _order_sends(
    slot_ids, counts, position, token_at, tokens, per_rank, top_k: tl.constexpr, ranks: tl.constexpr,
    tiles: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    rank = tl.program_id(0)
    lower = tl.arange(0, ranks)
    before = tl.sum(tl.load(counts + lower, mask=lower < rank, other=0)).to(tl.int32)
    for turn in range(tiles):
        token = turn * tile + tl.arange(0, tile)
        needed = _needed(slot_ids, token, tokens, rank * per_rank, per_rank, top_k)
        at = before + tl.cumsum(needed, 0) - 1
        here = needed > 0
        tl.store(position + rank.to(tl.int64) * tokens + token, tl.where(here, at, -1), mask=token < tokens)
        tl.store(token_at + at, token, mask=here)
        before += tl.sum(needed)


@declares(writes=["rows"])
@triton.jit
def _send_rows(
    first, second, third, token_at, counts, rows, width1, width2, width3, words, rank, most, ranks: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = row * 0
    place = row * 0 - 1
    for receiver in range(ranks):
        count = tl.load(counts + receiver)
        mine = (row >= begin) & (row < begin + count)
        place = tl.where(mine, receiver * most + row - begin, place)
        begin += count
    filled = place >= 0
    token = tl.load(token_at + row, mask=filled, other=0).to(tl.int64)
    word = tl.program_id(1) * block + tl.arange(0, block)
    word2 = word - width1
    word3 = word2 - width2
    mark = word3 - width3
    value = _column(first, word * 0, token, word, width1, filled)
    value = _column(second, value, token, word2, width2, filled)
    value = _column(third, value, token, word3, width3, filled)
    value = tl.where(mark == 0, token.to(tl.int32), value)
    value = tl.where(mark == 1, rank, value)
    value = tl.where(mark == 2, place.to(tl.int32), value)
    tl.store(rows + row * words + word, value, mask=(mark < 3) & (filled | (mark == 2)))


@triton.jit
def _column(column, value, row, word, width, real):
    mine = (word >= 0) & (word < width) & real
    return tl.where(mine, tl.load(column + row * width + word, mask=mine, other=0), value)


@declares(writes=["slots", "checked", "token", "marks"])
@triton.jit(do_not_specialize=["rows"])
def _arrive(
    scales, integers, counts, slots, checked, token, marks, rows, scale_stride, stride, rank, most, per_rank,
    ranks: tl.constexpr, top_k: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    real = row < rows
    at = row.to(tl.int64)
    line = integers + at * stride + top_k
    source = tl.load(line + 1, mask=real, other=-1)
    place = tl.load(line + 2, mask=real, other=-1)
    total = tl.load(counts) * 0
    begin = at * 0 - 1
    for peer in range(ranks):
        begin = tl.where(source == peer, total, begin)
        total += tl.load(counts + peer)
    filled = at < total
    right = filled & (begin >= 0) & (begin + place - rank * most == at)
    tl.store(token + row, tl.load(line, mask=real, other=0), mask=real)
    tl.store(marks + 2 * at, source, mask=real)
    tl.store(marks + 2 * at + 1, tl.where(filled, place, -1), mask=real)
    k = tl.arange(0, columns)
    mask = real[:, None] & (k < top_k)[None, :]
    slot = tl.load(integers + at[:, None] * stride + k[None, :], mask=mask, other=0) - rank * per_rank
    slot = tl.where(filled[:, None], tl.where(right[:, None], slot, 0), -1)
    scale = tl.load(scales + at[:, None] * scale_stride + k[None, :], mask=mask, other=0.0)
    tl.store(slots + at[:, None] * top_k + k[None, :], slot, mask=mask)
    tl.store(checked + at[:, None] * top_k + k[None, :], tl.where(right[:, None], scale, float("nan")), mask=mask)


@declares(writes=["total"])
@triton.jit(do_not_specialize=["tokens"])
def _add_returned(
    hidden, marks, position, counts, total, tokens, width, stride, mark_stride, rank, most,
    ranks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    value = tl.zeros([block], dtype=tl.float32)
    begin = token * 0
    for receiver in range(ranks):
        at = tl.load(position + receiver * tokens + token).to(tl.int64)
        sent = at >= 0
        source = tl.load(marks + at * mark_stride, mask=sent, other=0)
        place = tl.load(marks + at * mark_stride + 1, mask=sent, other=0)
        right = (source == rank) & (place == receiver * most + at - begin)
        row = tl.load(hidden + at * stride + column, mask=mask & sent, other=0.0).to(tl.float32)
        value += tl.where(sent, tl.where(right, row, float("nan")), 0.0)
        begin += tl.load(counts + receiver)
    tl.store(total + token * width + column, value.to(total.dtype.element_ty), mask=mask)
