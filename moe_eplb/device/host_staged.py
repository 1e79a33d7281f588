"""Collectives of tensors on a GPU over a backend that knows host memory alone."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["for_backend", "through_host"]


def through_host(group: dist.ProcessGroup | None, tensor: Tensor) -> bool:
    """Whether a collective of this tensor has to go through host memory, for which the host waits."""
    return tensor.is_cuda and group is not None and dist.get_backend(group) == "gloo"


def for_backend(group: dist.ProcessGroup | None, tensor: Tensor) -> Tensor:
    """The tensor where the group's backend can take it: itself, or a copy in host memory."""
    return tensor.cpu() if through_host(group, tensor) else tensor
