"""Symmetric memory of GPUs: torch's, with the NVSHMEM backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.symmetric import NEAR_BLOCKS, Symmetric, Window

__all__ = ["NvshmemSymmetric"]

_BYTES_A_BLOCK = 1 << 16
"""Of the send buffer, by whose size the operation chooses the number of blocks that copy, up to the most."""


class NvshmemSymmetric(Symmetric):
    """`torch.ops.symm_mem.all_to_all_vdev`: ranks tell each other their counts, pass a barrier, read each other's rows.

    Raises:
        BalancerError: E211 when there is no NVSHMEM, when ranks share GPUs, or when the group is not all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        _require(group, device)

    def _make(self, rows: int, words: int) -> Window:
        # Never fewer rows than make it take all blocks: any other number might not divide a row, see `align`.
        row_bytes = 4 * words
        return super()._make(max(rows, -(-NEAR_BLOCKS * _BYTES_A_BLOCK // row_bytes)), words)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        from torch.distributed import _symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(shape, dtype=dtype, device=self._device)
        symmetric_memory.rendezvous(buffer, group=self.group.group_name)
        return buffer

    def _exchange(self, window: Window) -> None:
        torch.ops.symm_mem.all_to_all_vdev(
            window.send, window.received, window.send_counts, window.counts_and_offsets, self.group.group_name
        )


def _require(group: dist.ProcessGroup, device: torch.device) -> None:
    from torch.distributed import _symmetric_memory as symmetric_memory

    if not symmetric_memory.is_nvshmem_available():
        raise _refused("torch's symmetric memory has no NVSHMEM here", "`eplbctl doctor` says what it needs")
    if dist.get_backend(group) == "gloo":
        raise _refused("ranks of a gloo group may share GPUs, and NVSHMEM takes one rank a GPU", "use an nccl group")
    if group.size() != dist.get_world_size():
        why = f"NVSHMEM makes buffers on all {dist.get_world_size()} ranks at once, and the group has {group.size()}"
        raise _refused(why, "start as many ranks as the layer has")
    if symmetric_memory.get_backend(device) == "NVSHMEM":
        return
    try:
        symmetric_memory.set_backend("NVSHMEM")
    except RuntimeError as error:  # something has used another backend already, and there can be only one
        raise _refused(str(error).splitlines()[0], "use symmetric memory for nothing else before") from error


def _refused(why: str, hint: str) -> BalancerError:
    return BalancerError("E211", "dispatch 'symm_mem' cannot be had", why=why, hint=f"{hint}; or dispatch: alltoall")
