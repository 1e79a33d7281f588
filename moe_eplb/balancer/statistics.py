"""Counting tokens per expert, summing over ranks, and folding the sum into the load that placements are made from."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.device.host_staged import for_backend

__all__ = ["AllReduce", "LayerStatistics", "LoadWindow", "accumulate", "require_gathered_shape", "require_ids_shape"]

_INT32_MAX = 2**31 - 1


class AllReduce:
    """Exact integer sum over the ranks of a group of its own, apart from the model's collectives."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, tensor: Tensor) -> None:
        """Replace an int64 tensor by its sum over the ranks."""
        sent = for_backend(self._group, tensor)
        dist.all_reduce(sent, group=self._group)
        if sent is not tensor:
            tensor.copy_(sent)


def accumulate(ids: Tensor, counts: Tensor) -> None:
    """Add the histogram of `ids` (any integer shape) to `counts` int32 [E]; ids outside [0, E) are ignored.

    Raises:
        BalancerError: E134 when a count would not fit int32.
    """
    before = counts.clone()
    ops.histogram(ids, counts)
    # Counts only grow, and never by more than the ids: where one is smaller than before it went round.
    wrapped = counts < before
    if bool(wrapped.any()):
        expert = int(wrapped.int().argmax())
        total = int(counts[expert]) + 2 * (_INT32_MAX + 1)
        counts.copy_(before)
        raise BalancerError(
            "E134", f"the count of expert {expert} overflows",
            why=f"{total} in one iteration, int32 holds {_INT32_MAX}",
            hint="split the batch into more iterations",
        )  # fmt: skip


def require_ids_shape(ids: Tensor, layer: int, *, top_k: int) -> None:
    """Raise BalancerError E141 unless `ids` is [T, K]."""
    if ids.ndim != 2 or ids.shape[1] != top_k:
        raise BalancerError(
            "E141", f"layer {layer}: expert ids have the wrong shape",
            why=f"{tuple(ids.shape)}, expected (tokens, {top_k})", hint="give top_k experts of each token",
        )  # fmt: skip


def require_gathered_shape(gathered: Tensor, layer: int, *, ranks: int, experts: int) -> None:
    """Raise BalancerError E141 unless `gathered` is [R, E]."""
    expected = (ranks, experts)
    if tuple(gathered.shape) != expected:
        raise BalancerError(
            "E141", f"layer {layer}: gathered statistics have the wrong shape",
            why=f"{tuple(gathered.shape)}, expected (ep_size, num_experts) = {expected}",
            hint="gather every rank's get_local_statistic_tensor() along a new first dimension",
        )  # fmt: skip


class LoadWindow:
    """The load of one layer's experts: a decayed sum of counts since the layer's last plan.

    Each iteration ``load = load * decay + sample``; the sample is the mean of the last `window` iterations' counts.
    Product and sum are separate float32 operations, so that no device contracts them into a fused multiply-add and all
    compute the same bits. TensorRT-LLM: window 1, decay 0.95.
    """

    def __init__(self, experts: int, *, decay: float, window: int) -> None:
        self._load = torch.zeros(experts, dtype=torch.float32)
        self._decay = decay
        self._recent: deque[Tensor] = deque(maxlen=window)

    def fold(self, counts: Tensor) -> None:
        """Fold in the reduced counts int64 [E] of one iteration, which lie in host memory."""
        self._recent.append(counts.clone())
        sample = torch.stack(list(self._recent)).sum(0).to(torch.float32) / len(self._recent)
        decayed = self._load * self._decay
        self._load = decayed + sample

    def reset(self) -> None:
        """Forget all counts."""
        self._load = torch.zeros_like(self._load)
        self._recent.clear()

    def take(self) -> np.ndarray:
        """The load float64 [E] for a plan; it starts again from zero."""
        load = self._load.numpy().astype(np.float64)
        self._load = torch.zeros_like(self._load)
        return load


class LayerStatistics:
    """Counts of one layer on this rank, and its load.

    Args:
        experts, decay, window: See `LoadWindow`.
        device: Where the counts live.

    Attributes:
        flag: int32 [1] on the device, whether this iteration counts.
        load: The layer's load, from the counts of all ranks.
    """

    def __init__(self, experts: int, *, decay: float, window: int, device: torch.device | None = None) -> None:
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.load = LoadWindow(experts, decay=decay, window=window)
        self._experts = experts
        self._counts: Tensor | None = None

    def counts(self) -> Tensor:
        """int32 [E], made when first asked for and kept at its address."""
        if self._counts is None:
            with torch.inference_mode(False):  # whatever mode comes first, iterations of any mode write to it later
                self._counts = torch.zeros(self._experts, dtype=torch.int32, device=self.flag.device)
        return self._counts

    def use(self, counts: Tensor) -> None:
        """Count into an int32 [E] of somebody else's."""
        self._counts = counts

    def count(self, ids: Tensor, is_first_stage: bool) -> None:
        """Add the histogram of `ids`, to zero on the first stage."""
        counts = self.counts()
        if is_first_stage:
            counts.zero_()
        if self.flag.item():
            accumulate(ids, counts)
