"""Triton kernels of the router: top-k, histogram of the choice, and the replica that each entry takes."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain import BLOCK, Choice
from moe_eplb.device.sanitizer import declares

__all__ = ["histogram", "route", "top_k"]

_TILE = 64
"""Entries of a block that one program routes: small, so that one block of a decode step fills many programs."""
_OTHERS = 256
"""Earlier entries of the block that it compares with at a time."""
_CELLS = 1024
"""Logits that a program of the router holds at a time."""
_BY_PROBABILITY, _BY_LOGIT, _NORMALIZED, _SIGMOID = 1, 2, 4, 8
_METHODS: dict[Choice, int] = {
    "default": _BY_PROBABILITY,
    "renormalize_naive": _BY_PROBABILITY | _NORMALIZED,
    "renormalize": _BY_LOGIT,
    "sigmoid": _BY_LOGIT | _SIGMOID,
}


def histogram(ids: Tensor, counts: Tensor) -> None:
    """See `plain.histogram`."""
    if ids.numel():
        bins = max(16, triton.next_power_of_2(counts.numel() + 1))
        _histogram[(triton.cdiv(ids.numel(), BLOCK),)](
            ids.contiguous(), counts, ids.numel(), counts.numel(), BLOCK, bins
        )


def route(
    ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int, counts: Tensor | None = None
) -> Tensor:
    """See `plain.route`. Each entry is compared with the earlier ones of its block, unless no expert has replicas."""
    routed = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if ids.numel():
        _route[(triton.cdiv(ids.numel(), _TILE),)](
            ids.contiguous(), count, start, slots, routed, routed if counts is None else counts, ids.numel(),
            count.numel(), slots.numel(), offset, invalid, counts is not None, BLOCK, _TILE, _OTHERS,
        )  # fmt: skip
    return routed


def top_k(logits: Tensor, k: int, method: Choice) -> tuple[Tensor, Tensor]:
    """See `plain.top_k`. Reads each logit once and writes 8 bytes a choice."""
    tokens, experts = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    scales = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    if ids.numel():
        width = triton.next_power_of_2(experts)
        rows = max(1, min(_CELLS // width, 8))
        _top_k[(triton.cdiv(tokens, rows),)](
            logits.contiguous(),
            ids,
            scales,
            tokens,
            experts,
            _METHODS[method],
            k,
            triton.next_power_of_2(k),
            rows,
            width,
        )
    return ids, scales


@declares(writes=["counts"])
@triton.jit(do_not_specialize=["entries"])
def _histogram(ids, counts, entries, experts, block: tl.constexpr, nbins: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    expert = tl.load(ids + at, mask=at < entries, other=-1)
    # The last bin takes what belongs to nobody; it is never written.
    expert = tl.where((expert >= 0) & (expert < experts), expert, nbins - 1).to(tl.int32)
    found = tl.histogram(expert, nbins)
    bins = tl.arange(0, nbins)
    tl.atomic_add(counts + bins, found, mask=(bins < experts) & (found > 0), sem="relaxed")


@declares(writes=["routed", "counts"])
@triton.jit(do_not_specialize=["entries", "offset", "invalid"])
def _route(
    ids, count, start, slots, routed, counts, entries, experts, num_slots, offset, invalid, counting: tl.constexpr,
    block: tl.constexpr, tile: tl.constexpr, others: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * tile
    at = first + tl.arange(0, tile)
    expert = tl.load(ids + at, mask=at < entries, other=-1)
    inside = (expert >= 0) & (expert < experts)
    expert = tl.where(inside, expert, -1).to(tl.int32)
    if counting:
        # The last of an expert's entries here adds for all of them, so that a hot expert is not added to one by one.
        equal = expert[:, None] == expert[None, :]
        later = tl.sum((equal & (at[:, None] > at[None, :])).to(tl.int32), axis=0)
        found = tl.sum(equal.to(tl.int32), axis=0)
        tl.atomic_add(counts + expert, found, mask=inside & (later == 0), sem="relaxed")
    replicas = tl.maximum(tl.load(count + expert, mask=inside, other=1), 1)
    seen = tl.zeros([tile], dtype=tl.int32)
    if tl.max(replicas, axis=0) > 1:  # else the first replica is the only one, whoever came before
        here = first // block * block
        while here < first:
            other_at = here + tl.arange(0, others)
            other = tl.load(ids + other_at, mask=other_at < first, other=-2)
            # Compared as they are loaded: a number that does not fit int32 is no expert. A thread keeps the column of
            # its own entry, so that it adds up alone.
            seen += tl.sum((other[:, None] == expert[None, :]).to(tl.int32), axis=0)
            here += others
        same = (expert[:, None] == expert[None, :]) & (at[:, None] < at[None, :])
        seen += tl.sum(same.to(tl.int32), axis=0)
    replica = (seen + first // block + offset) % replicas
    place = tl.load(start + expert, mask=inside, other=0) + replica
    slot = tl.load(slots + place, mask=inside & (place >= 0) & (place < num_slots), other=invalid)
    tl.store(routed + at, slot, mask=at < entries)


@triton.jit
def _order(value):
    """int32 in the order of float32, -0 equal to 0, NaN above all; none is the smallest int32."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, ordered)


@triton.jit
def _value(ordered):
    """What `_order` was given, but for the sign of 0 and the bits of NaN."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@declares(writes=["ids", "scales"])
@triton.jit(do_not_specialize=["tokens"])
def _top_k(
    logits, ids, scales, tokens, experts, method: tl.constexpr, k: tl.constexpr, k_width: tl.constexpr,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    expert = tl.arange(0, width)
    real = (row < tokens)[:, None] & (expert < experts)[None, :]
    at = row.to(tl.int64)[:, None] * experts + expert[None, :]
    merit = tl.load(logits + at, mask=real, other=float("-inf")).to(tl.float32)
    # A row that is not there is all zeros, so that it makes no NaN.
    merit = tl.where((row < tokens)[:, None], merit, 0.0)
    if method & 1:
        power = tl.exp(merit - tl.max(merit, axis=1)[:, None])
        merit = power / tl.sum(power, axis=1)[:, None]
    left = tl.where((expert < experts)[None, :], _order(merit), -0x80000000)
    column = tl.arange(0, k_width)
    chosen_ids = tl.zeros([rows, k_width], dtype=tl.int32)
    chosen = tl.full([rows, k_width], float("-inf"), dtype=tl.float32)
    for turn in tl.static_range(k):
        best = tl.max(left, axis=1)
        winner = tl.min(tl.where(left == best[:, None], expert[None, :], width), axis=1)
        won = expert[None, :] == winner[:, None]
        value = _value(best)
        chosen_ids = tl.where((column == turn)[None, :], winner[:, None], chosen_ids)
        chosen = tl.where((column == turn)[None, :], value[:, None], chosen)
        left = tl.where(won, -0x80000000, left)
    if method & 4:
        chosen = chosen / tl.sum(tl.where((column < k)[None, :], chosen, 0.0), axis=1)[:, None]
    elif method & 8:
        chosen = tl.sigmoid(chosen)
    elif method & 2:
        power = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        chosen = power / tl.sum(power, axis=1)[:, None]
    out = row.to(tl.int64)[:, None] * k + column[None, :]
    written = (row < tokens)[:, None] & (column < k)[None, :]
    tl.store(ids + out, chosen_ids, mask=written)
    tl.store(scales + out, chosen, mask=written)
