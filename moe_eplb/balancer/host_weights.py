"""One full host copy of a layer's expert weights per node, each rank writing its part and reading all.

Behaviour after TensorRT-LLM's ``HostMoeTensorSharer``; segments and their names are `moe_eplb.balancer.host_memory`'s.
"""

from __future__ import annotations

import mmap
import os

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.balancer.host_memory import create_segment, open_segment, remove_segment, segment_name
from moe_eplb.core.errors import HostMemoryError

__all__ = ["HostMoeTensorSharer"]

_ALIGN = 256


class HostMoeTensorSharer:
    """Shares the host copies of one layer between the ranks of a node.

    Args:
        layer: Index of the layer in the balancer.
        expert_count: E.
        rank, ranks: This process among the processes of the node.
        instance: Name part common to all ranks of this balancer and to nobody else.
        group: Process group of the node's ranks; None for one rank.
    """

    def __init__(
        self, layer: int, expert_count: int, *, rank: int, ranks: int, instance: str, group: dist.ProcessGroup | None
    ) -> None:
        self._layer, self._experts = layer, expert_count
        self._rank, self._ranks, self._group = rank, ranks, group
        self._instance = instance
        self._shared: dict[int, dict[str, Tensor]] = {}
        self._views: dict[int, dict[str, Tensor]] = {}
        self._own_segment = ""
        self.host_bytes = 0

    def experts_of(self, rank: int) -> range:
        """The experts whose host copy `rank` writes: [r*E//S, (r+1)*E//S) of S ranks."""
        return range(rank * self._experts // self._ranks, (rank + 1) * self._experts // self._ranks)

    def share_host_tensor(self, expert: int, name: str, tensor: Tensor) -> None:
        """Give this rank's copy of one weight of one expert; it is written to shared memory by `finalize`."""
        if expert not in self.experts_of(self._rank):
            own = self.experts_of(self._rank)
            raise HostMemoryError(
                "E164", f"layer {self._layer}: expert {expert} is not shared by rank {self._rank}",
                why=f"it shares experts {own.start} to {own.stop - 1}", hint="share only load_expert_ids",
            )  # fmt: skip
        if name in self._shared.setdefault(expert, {}):
            raise HostMemoryError("E165", f"layer {self._layer}: {name} of expert {expert} was shared twice")
        self._shared[expert][name] = tensor.detach().cpu().contiguous()

    def finalize(self) -> None:
        """Write this rank's part, wait for the other ranks (bounded by the group's timeout) and map theirs."""
        spec = self._weight_spec()
        sizes = [_aligned(dtype, shape) for _, dtype, shape in spec]
        stride = sum(sizes)
        mine = self._write_part(spec, stride)
        names = self._exchange_names()
        for rank, name in enumerate(names):
            count = len(self.experts_of(rank))
            if not count:
                continue
            memory = mine if rank == self._rank and mine is not None else open_segment(name, count * stride)
            for position, expert in enumerate(self.experts_of(rank)):
                self._views[expert] = _views(memory, position * stride, spec)
        self.host_bytes = self._experts * stride
        self._shared.clear()

    def host_tensor(self, expert: int, name: str) -> Tensor:
        """The shared host copy of one weight."""
        return self._views[expert][name]

    @property
    def names(self) -> frozenset[str]:
        """Names of the shared weights."""
        return frozenset(self._views[0]) if self._views else frozenset()

    def close(self) -> None:
        """Drop the mappings and remove this rank's segment."""
        self._views.clear()
        if self._own_segment:
            remove_segment(self._own_segment)
            self._own_segment = ""

    def _weight_spec(self) -> list[tuple[str, torch.dtype, torch.Size]]:
        own = self.experts_of(self._rank)
        missing = [expert for expert in own if expert not in self._shared]
        if missing or not len(own):
            raise HostMemoryError(
                "E166", f"layer {self._layer}: rank {self._rank} lacks host copies",
                why=f"experts without any: {missing or 'none to share'}, of {self._experts} over {self._ranks} ranks",
                hint="share every expert of load_expert_ids before finalize_model, with at least one expert a rank",
            )  # fmt: skip
        first = {name: (t.dtype, t.shape) for name, t in self._shared[own.start].items()}
        for expert in own:
            found = {name: (t.dtype, t.shape) for name, t in self._shared[expert].items()}
            if found != first:
                raise HostMemoryError(
                    "E167", f"layer {self._layer}: expert {expert} has other weights than expert {own.start}",
                    why=f"{found} against {first}",
                )  # fmt: skip
        return [(name, *first[name]) for name in sorted(first)]

    def _write_part(self, spec: list[tuple[str, torch.dtype, torch.Size]], stride: int) -> mmap.mmap | None:
        own = self.experts_of(self._rank)
        self._own_segment, memory = create_segment(self._instance, self._part(self._rank), len(own) * stride)
        for position, expert in enumerate(own):
            for name, view in _views(memory, position * stride, spec).items():
                view.copy_(self._shared[expert][name])
        return memory

    def _exchange_names(self) -> list[str]:
        """Every rank's segment name; the collective is also the barrier after which all parts are written."""
        pids = torch.zeros(self._ranks, dtype=torch.int64)
        pids[self._rank] = os.getpid()
        if self._group is not None and self._ranks > 1:
            dist.all_reduce(pids, group=self._group)
        return [segment_name(self._instance, self._part(r), pid=int(pid)) for r, pid in enumerate(pids)]

    def _part(self, rank: int) -> str:
        return f"l{self._layer}r{rank}"


def _aligned(dtype: torch.dtype, shape: torch.Size) -> int:
    return -(-shape.numel() * dtype.itemsize // _ALIGN) * _ALIGN


def _views(memory: mmap.mmap, offset: int, spec: list[tuple[str, torch.dtype, torch.Size]]) -> dict[str, Tensor]:
    views = {}
    for name, dtype, shape in spec:
        views[name] = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
        offset += _aligned(dtype, shape)
    return views
