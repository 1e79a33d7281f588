"""Storage of the expert weights in cells, and the SwiGLU feed-forward over entries that are grouped by cell or slot.

A slot is what tokens are sent to; its cell is where its weights lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.device.ops import FP8
from moe_eplb.moe.fp8 import in_expert_dtype, require_fp8, scaled_product
from moe_eplb.moe.grouped_mm import grouped_mm
from moe_eplb.moe.grouping import Grouped
from moe_eplb.moe.weight_names import scale_name, weight_names

__all__ = ["ExpertSlots", "ffn_twin"]

_ROW_BYTES = 16
_FEW_ROWS = 128
"""Rows a slot up to which kernels that are made for few rows take less time than torch's tiles of 256, on Hopper."""


class ExpertSlots(nn.Module):
    """The S slots of a rank: one tensor a weight name, "w3_w1" [S + X, 2I, D] and "w2" [S + X, D, I].

    In fp8, "w3_w1_scale" [S + X, 2I] and "w2_scale" [S + X, D] beside them.

    Slots live in S + X cells, the rows of these tensors; the X spare ones are where the balancer may write the experts
    that come next. Without spare cells it overwrites single slots in place. The tensors keep their addresses for the
    life of the module.

    Attributes:
        slot_cells: int32 [S], the cell of each slot; slot s lives in cell s at first.
        dtype: Of the matrices.
        names: Of all tensors.

    Raises:
        BalancerError: E152 when a row of D or I elements is not a multiple of 16 bytes, which grouped GEMM needs; E188
            when the device cannot multiply fp8.
    """

    def __init__(
        self,
        num_slots: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        spare: int = 0,
    ) -> None:
        super().__init__()
        _check_alignment(hidden_size, intermediate_size, dtype)
        self.num_slots, self.spare = num_slots, spare
        self.dtype, self.names = dtype, weight_names(dtype)
        self._few_rows = _FEW_ROWS if dtype is torch.bfloat16 and _is_hopper(device) else -1
        if dtype is FP8:
            require_fp8(device or torch.device("cpu"))
        self.slot_cells = torch.arange(num_slots, dtype=torch.int32, device=device)
        shapes = {
            "w3_w1": (num_slots + spare, 2 * intermediate_size, hidden_size),
            "w2": (num_slots + spare, hidden_size, intermediate_size),
        }
        for name, shape in shapes.items():
            self._add(name, torch.zeros(shape, dtype=dtype, device=device))
            if scale_name(name) in self.names:
                self._add(scale_name(name), torch.zeros(shape[:2], dtype=torch.float32, device=device))

    def _add(self, name: str, weight: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def weight(self, name: str) -> Tensor:
        """The tensor of all cells: the very storage that `grouped_ffn` reads."""
        return self.get_parameter(name).data

    def slot_tensor(self, local_slot: int, name: str) -> Tensor:
        """View of one slot's tensor, in the cell where it lives now."""
        return self.cell_tensor(int(self.slot_cells[local_slot]), name)

    def cell_tensor(self, cell: int, name: str) -> Tensor:
        """View of one cell's tensor."""
        return self.weight(name)[cell]

    def by_cell(self) -> list[dict[str, Tensor]]:
        """For each cell, its tensors by name."""
        return [
            {name: self.cell_tensor(cell, name) for name in self.names} for cell in range(self.num_slots + self.spare)
        ]

    def group(
        self, hidden: Tensor, slots: Tensor, entries: int | None = None, copying: Callable[[], None] = lambda: None, *,
        first_slot: int = 0, likely: int | None = None,
    ) -> Grouped:  # fmt: skip
        """Hidden states [M, D], once for each entry of `slots` int [M, K], in order of the cells that hold the slots.

        Where the products will be those of few rows, the order is that of slots, and parts are told. What is fastest
        depends on how many rows a slot has, and on an H200 no bit of a result.

        Args:
            hidden: [M, D]; rows may be strided.
            slots: Slots, of which this rank's are [first_slot, first_slot + S); others have no entry.
            entries: How many entries have a slot, and N; None when nobody knows, and N is their bound M * K.
            copying: Called before the rows are copied.
            first_slot: The slot that is local slot 0.
            likely: How many entries probably have a slot; `entries` or their bound unless given.
        """
        size = slots.numel() if entries is None else entries
        each = -(-(size if likely is None else likely) // self.num_slots)
        if each <= self._few_rows:
            rows, position, offs, parts = ops.permute_in_parts(
                hidden, slots, self.slot_cells, ops.part_rows(each), entries, copying, first_slot
            )
            return Grouped(rows, position, offs, parts=parts)
        cells = self.slot_cells if self.spare else None
        given = (hidden, slots, self.num_slots + self.spare, cells, entries, copying, first_slot)
        if self.dtype is FP8:
            rows, row_scale, position, offs = ops.permute_rows_fp8(*given)
            return Grouped(rows, position, offs, row_scale)
        return Grouped(*ops.permute_rows(*given))

    def by_slot(self) -> Sequence[Mapping[str, Tensor]]:
        """For each local slot, the tensors by name that `grouped_ffn` reads at the time of asking."""
        return _Slots(self)

    def load(self, local_slot: int, weights: Mapping[str, Tensor]) -> None:
        """Copy an expert's tensors, by name, into a slot; matrices without scales are quantised where slots are fp8.

        Raises:
            BalancerError: E153 when a tensor is missing or has another shape or dtype than the slot's.
        """
        weights = self.fitted(weights)
        for name in self.names:
            target, source = self.slot_tensor(local_slot, name), weights.get(name)
            if source is None or (source.shape, source.dtype) != (target.shape, target.dtype):
                raise BalancerError(
                    "E153",
                    f"expert weight {name} does not fit its slot",
                    why=f"slot {_described(target)}, expert {'none' if source is None else _described(source)}",
                    hint=f"an expert needs the tensors {', '.join(self.names)}, the rows of w3 before those of w1",
                )
            target.copy_(source)

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An expert's tensors as slots hold them, see `in_expert_dtype`."""
        return in_expert_dtype(weights, self.dtype)

    def grouped_ffn(self, grouped: Grouped) -> Tensor:
        """w2 @ (silu(w1 x) * (w3 x)) [N, D] of rows [N, D] as `group` gives them.

        Outputs of fp8 experts are bfloat16. Outputs of rows after the last end hold anything.
        """
        rows, offs = grouped.rows, grouped.offs
        if self.dtype is FP8:
            assert grouped.row_scale is not None, "fp8 rows come with scales"
            activated, scale = ops.swiglu_fp8(self._scaled(rows, grouped.row_scale, "w3_w1", offs), offs)
            return self._scaled(activated, scale, "w2", offs)
        if grouped.parts is not None:
            activated = ops.grouped_swiglu(rows, self.weight("w3_w1"), grouped.parts)
            return ops.grouped_product(activated, self.weight("w2"), grouped.parts)
        return self._multiply(ops.swiglu(self._multiply(rows, "w3_w1", offs), offs), "w2", offs)

    def _scaled(self, rows: Tensor, row_scale: Tensor, name: str, offs: Tensor) -> Tensor:
        return scaled_product(rows, row_scale, self.weight(name), self.weight(scale_name(name)), offs)

    def _multiply(self, rows: Tensor, name: str, offs: Tensor) -> Tensor:
        weight = self.weight(name).transpose(1, 2)
        if not len(rows):
            return rows.new_empty(0, weight.shape[2])
        if rows.is_cuda and rows.dtype is torch.float32:  # which torch's grouped GEMM does not take there
            return _multiply_by_cell(rows, weight, offs)
        return grouped_mm(rows, weight, offs=offs)


class _Slots(Sequence[Mapping[str, Tensor]]):
    """Looks a slot's cell up each time, since the balancer may have changed it."""

    def __init__(self, experts: ExpertSlots) -> None:
        self._experts = experts

    def __len__(self) -> int:
        return self._experts.num_slots

    @overload
    def __getitem__(self, slot: int) -> Mapping[str, Tensor]: ...

    @overload
    def __getitem__(self, slot: slice) -> Sequence[Mapping[str, Tensor]]: ...

    def __getitem__(self, slot: int | slice) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        if isinstance(slot, slice):
            return [self[index] for index in range(*slot.indices(len(self)))]
        if not 0 <= slot < len(self):
            raise IndexError(slot)
        return {name: self._experts.slot_tensor(slot, name) for name in self._experts.names}


def _is_hopper(device: torch.device | None) -> bool:
    """Whether tiles of few rows were cut for this device: others have less shared memory, or were not measured."""
    return device is not None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _multiply_by_cell(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Grouped product one cell after the other: rows [N, A], weight [G, A, B], ends int32 [G]. Waits for the device."""
    product = rows.new_empty(len(rows), weight.shape[2])
    for cell, (begin, end) in enumerate(pairwise([0, *offs.tolist()])):
        torch.mm(rows[begin:end], weight[cell], out=product[begin:end])
    return product


def _check_alignment(hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
    step = _ROW_BYTES // dtype.itemsize
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size < 1 or size % step:
            raise BalancerError(
                "E152",
                f"{name} does not fit grouped GEMM",
                why=f"{size} elements of {dtype} are {size * dtype.itemsize} bytes, not a multiple of {_ROW_BYTES}",
                hint=f"choose a multiple of {step}, such as {max(step, -(-size // step) * step)}",
            )


def ffn_twin(hidden: Tensor, slots: Tensor, w3_w1: Tensor, w2: Tensor) -> Tensor:
    """The same feed-forward one entry at a time in float64: hidden [N, D], slots int [N] -> float64 [N, D]. Slow."""
    outputs = [torch.zeros(0, hidden.shape[1], dtype=torch.float64)]
    for row, slot in zip(hidden.double(), slots.tolist(), strict=True):
        w3, w1 = w3_w1[slot].double().chunk(2)
        gate = w1 @ row
        outputs.append((w2[slot].double() @ (gate * torch.sigmoid(gate) * (w3 @ row))).unsqueeze(0))
    return torch.cat(outputs)
