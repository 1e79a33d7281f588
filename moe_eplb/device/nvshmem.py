"""Symmetric memory of GPUs: torch's, with the NVSHMEM backend."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.symmetric import Symmetric

__all__ = ["NvshmemSymmetric"]


class NvshmemSymmetric(Symmetric):
    """`torch.ops.symm_mem.nvshmem_all_to_all`: the library's own collective of equal blocks, on the current stream.

    Not `all_to_all_vdev`, which takes sizes from the device: its copying kernel writes over the offsets that it reads.

    Raises:
        BalancerError: E211 when there is no NVSHMEM, when ranks share GPUs, or when the group is not all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        _require(group, device)

    def _empty(self, shape: tuple[int, int]) -> Tensor:
        from torch.distributed import _symmetric_memory as symmetric_memory

        buffer = symmetric_memory.empty(shape, dtype=torch.int32, device=self._device)
        symmetric_memory.rendezvous(buffer, group=self.group.group_name)
        return buffer

    def _exchange(self, send: Tensor, received: Tensor) -> None:
        torch.ops.symm_mem.nvshmem_all_to_all(send, received, self.group.group_name)


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
