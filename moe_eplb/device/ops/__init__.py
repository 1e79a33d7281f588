"""Operations of a MoE layer that torch has no single call for: plain torch, and on a GPU Triton kernels that equal it.

Each function goes by where its tensors are; see `moe_eplb.device.ops.plain` for what it does. On a GPU none of them
waits for the device, and no size depends on the contents of a tensor, so all of them can be captured into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from moe_eplb.device.ops import plain
from moe_eplb.device.ops.plain import FP8, Choice, quantize_rows
from moe_eplb.device.ops.plain_parts import Parts, part_rows
from moe_eplb.device.ops.plain_sends import MARKS, Arrived, needed_by

__all__ = [
    "FP8",
    "MARKS",
    "Arrived",
    "Choice",
    "Parts",
    "add_blocks",
    "add_returned",
    "arrive",
    "combine",
    "grouped_product",
    "grouped_swiglu",
    "histogram",
    "needed_by",
    "order_sends",
    "pack_rows",
    "part_rows",
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


def _at(tensor: Tensor) -> ModuleType:
    if not tensor.is_cuda:
        return plain
    from moe_eplb.device.ops import triton_ops  # Triton is there wherever torch has a GPU

    return triton_ops


def histogram(ids: Tensor, counts: Tensor) -> None:
    """See `plain.histogram`."""
    _at(ids).histogram(ids, counts)


def route(
    ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int, counts: Tensor | None = None
) -> Tensor:
    """See `plain.route`."""
    routed: Tensor = _at(ids).route(ids, count, start, slots, offset=offset, invalid=invalid, counts=counts)
    return routed


def top_k(logits: Tensor, k: int, method: Choice) -> tuple[Tensor, Tensor]:
    """See `plain.top_k`."""
    ids, scales = _at(logits).top_k(logits, k, method)
    return ids, scales


def permute(slots: Tensor, groups: int, cells: Tensor | None = None, first_slot: int = 0) -> tuple[Tensor, Tensor]:
    """See `plain.permute`."""
    position, offs = _at(slots).permute(slots, groups, cells, first_slot)
    return position, offs


def permute_rows(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plain.permute_rows`."""
    rows, position, offs = _at(slots).permute_rows(hidden, slots, groups, cells, entries, copying, first_slot)
    return rows, position, offs


def permute_in_parts(
    hidden: Tensor, slots: Tensor, cells: Tensor, rows: int, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Parts]:  # fmt: skip
    """See `plain.permute_in_parts`."""
    grouped, position, offs, parts = _at(slots).permute_in_parts(
        hidden, slots, cells, rows, entries, copying, first_slot
    )
    return grouped, position, offs, parts


def permute_rows_fp8(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plain.permute_rows_fp8`."""
    rows, scale, position, offs = _at(slots).permute_rows_fp8(
        hidden, slots, groups, cells, entries, copying, first_slot
    )
    return rows, scale, position, offs


def swiglu(rows: Tensor, offs: Tensor | None = None) -> Tensor:
    """See `plain.swiglu`."""
    result: Tensor = _at(rows).swiglu(rows, offs)
    return result


def swiglu_fp8(rows: Tensor, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `plain.swiglu_fp8`."""
    values, scale = _at(rows).swiglu_fp8(rows, offs)
    return values, scale


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, parts: Parts) -> Tensor:
    """See `plain_ffn.grouped_swiglu`."""
    result: Tensor = _at(rows).grouped_swiglu(rows, w3_w1, parts)
    return result


def grouped_product(rows: Tensor, weights: Tensor, parts: Parts) -> Tensor:
    """See `plain_ffn.grouped_product`."""
    result: Tensor = _at(rows).grouped_product(rows, weights, parts)
    return result


def combine(output: Tensor, position: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `plain.combine`."""
    total: Tensor = _at(output).combine(output, position, scales, dtype)
    return total


def add_blocks(blocks: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """See `plain.add_blocks`."""
    total: Tensor = _at(blocks).add_blocks(blocks, tokens, dtype)
    return total


def pack_rows(columns: Sequence[Tensor], rows: Tensor) -> None:
    """See `plain.pack_rows`."""
    _at(rows).pack_rows(columns, rows)


def order_sends(slot_ids: Tensor, *, ranks: int, slots_per_rank: int, block: int) -> tuple[Tensor, Tensor]:
    """See `plain_sends.order_sends`."""
    place, token_at = _at(slot_ids).order_sends(slot_ids, ranks=ranks, slots_per_rank=slots_per_rank, block=block)
    return place, token_at


def send_rows(columns: Sequence[Tensor], token_at: Tensor, rows: Tensor, *, rank: int) -> None:
    """See `plain_sends.send_rows`."""
    _at(rows).send_rows(columns, token_at, rows, rank=rank)


def arrive(scales: Tensor, integers: Tensor, *, rank: int, block: int, slots_per_rank: int) -> Arrived:
    """See `plain_sends.arrive`."""
    arrived: Arrived = _at(scales).arrive(scales, integers, rank=rank, block=block, slots_per_rank=slots_per_rank)
    return arrived


def add_returned(hidden: Tensor, marks: Tensor, place: Tensor, *, rank: int, block: int) -> Tensor:
    """See `plain_sends.add_returned`."""
    total: Tensor = _at(hidden).add_returned(hidden, marks, place, rank=rank, block=block)
    return total
