"""Operations of a MoE layer that torch has no single call for: plain torch, and on a GPU Triton kernels that equal it.

Each function goes by where its tensors are; see `moe_eplb.device.ops.plain` for what it does.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from moe_eplb.device.ops import plain

__all__ = ["combine", "histogram", "permute", "route", "swiglu"]


def _at(tensor: Tensor) -> ModuleType:
    if not tensor.is_cuda:
        return plain
    from moe_eplb.device.ops import triton_ops  # Triton is there wherever torch has a GPU

    return triton_ops


def histogram(ids: Tensor, counts: Tensor) -> None:
    """See `plain.histogram`."""
    _at(ids).histogram(ids, counts)


def route(ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int) -> Tensor:
    """See `plain.route`."""
    routed: Tensor = _at(ids).route(ids, count, start, slots, offset=offset, invalid=invalid)
    return routed


def permute(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """See `plain.permute`."""
    position, offs = _at(slots).permute(slots, num_slots)
    return position, offs


def swiglu(rows: Tensor) -> Tensor:
    """See `plain.swiglu`."""
    result: Tensor = _at(rows).swiglu(rows)
    return result


def combine(output: Tensor, position: Tensor, scales: Tensor) -> Tensor:
    """See `plain.combine`."""
    total: Tensor = _at(output).combine(output, position, scales)
    return total
