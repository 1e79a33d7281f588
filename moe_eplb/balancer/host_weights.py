"""One full host copy of a layer's expert weights per node, each rank writing its part and reading all.

Behaviour after TensorRT-LLM's ``HostMoeTensorSharer``; segments and their names are `moe_eplb.balancer.host_memory`'s.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.balancer.host_memory import create_segment, open_segment, remove_segment, segment_name
from moe_eplb.core.errors import HostMemoryError

__all__ = ["HostMoeTensorSharer"]

_ALIGN = 256
_Spec = list[tuple[str, torch.dtype, torch.Size]]
"""The weights of one expert, in order of their names."""


class HostMoeTensorSharer:
    """Shares the host copies of one layer between the ranks of a node.

    Where `expect` has told what is coming, tensors are written to shared memory as they are given; otherwise they are
    kept until `finalize`, which takes twice the memory for that time.

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
        self._expected: _Spec | None = None
        self._memory: mmap.mmap | None = None
        self._mapped: list[mmap.mmap] = []
        self._remove: Callable[[], object] | None = None
        self.host_bytes = 0

    def experts_of(self, rank: int) -> range:
        """The experts whose host copy `rank` writes: [r*E//S, (r+1)*E//S) of S ranks."""
        return range(rank * self._experts // self._ranks, (rank + 1) * self._experts // self._ranks)

    def expect(self, weights: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Tell dtype and shape of each weight, the same for all experts, before the first is shared."""
        if self._expected is not None or self._shared:
            raise HostMemoryError(
                "E169", f"layer {self._layer}: the weights to expect were given too late",
                why="some have been shared already" if self._shared else "they were given before",
                hint="call expect once, before share_host_tensor",
            )  # fmt: skip
        self._expected = [(name, *weights[name]) for name in sorted(weights)]
        if self._own:
            self._reserve(self._expected)

    def share_host_tensor(self, expert: int, name: str, tensor: Tensor) -> None:
        """Give this rank's copy of one weight of one expert; it is copied, at once or by `finalize`, see `expect`."""
        if expert not in self._own:
            raise HostMemoryError(
                "E164", f"layer {self._layer}: expert {expert} is not shared by rank {self._rank}",
                why=f"it shares experts {self._own.start} to {self._own.stop - 1}", hint="share only load_expert_ids",
            )  # fmt: skip
        if name in self._shared.setdefault(expert, {}):
            raise HostMemoryError("E165", f"layer {self._layer}: {name} of expert {expert} was shared twice")
        if self._expected is None:
            self._shared[expert][name] = tensor.detach().cpu().contiguous()
        else:
            self._shared[expert][name] = self._write(expert, name, tensor.detach())

    def finalize(self) -> None:
        """Finish this rank's part, wait for the other ranks (bounded by the group's timeout) and map theirs."""
        spec = self._weight_spec()
        if self._memory is None:
            self._reserve(spec)
            for expert in self._own:
                for name, view in self._views[expert].items():
                    view.copy_(self._shared[expert][name])
        stride = _stride(spec)
        for rank, segment in enumerate(self._exchange_names()):
            experts = self.experts_of(rank)
            if rank != self._rank and experts:
                self._map(open_segment(segment, len(experts) * stride), experts, spec)
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
        self._shared.clear()
        self._memory = None
        self._mapped.clear()
        if self._remove is not None:
            self._remove()

    @property
    def _own(self) -> range:
        return self.experts_of(self._rank)

    def _weight_spec(self) -> _Spec:
        """What every expert of this rank has been given with."""
        own = self._own
        missing = [expert for expert in own if expert not in self._shared]
        if missing or not len(own):
            raise HostMemoryError(
                "E166", f"layer {self._layer}: rank {self._rank} lacks host copies",
                why=f"experts without any: {missing or 'none to share'}, of {self._experts} over {self._ranks} ranks",
                hint="share every expert of load_expert_ids before finalize_model, with at least one expert a rank",
            )  # fmt: skip
        first = self._expected or _spec_of(self._shared[own.start])
        for expert in own:
            found = _spec_of(self._shared[expert])
            if found != first:
                other = "what was expected" if self._expected else f"expert {own.start}"
                raise HostMemoryError(
                    "E167", f"layer {self._layer}: expert {expert} has other weights than {other}",
                    why=f"{_described(found)} against {_described(first)}",
                )  # fmt: skip
        return first

    def _reserve(self, spec: _Spec) -> None:
        """Make this rank's segment."""
        size = len(self._own) * _stride(spec)
        name, self._memory = create_segment(self._instance, self._part(self._rank), size)
        # A model that could not be built to its end is not always shut down.
        self._remove = weakref.finalize(self, _remove_own, name, os.getpid())
        self._map(self._memory, self._own, spec)

    def memory(self) -> list[Tensor]:
        """The bytes of each mapped part, uint8."""
        return [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._mapped]

    def _map(self, memory: mmap.mmap, experts: range, spec: _Spec) -> None:
        self._mapped.append(memory)
        for position, expert in enumerate(experts):
            self._views[expert] = _views(memory, position * _stride(spec), spec)

    def _write(self, expert: int, name: str, tensor: Tensor) -> Tensor:
        view = self._views[expert].get(name)
        if view is None or (view.dtype, view.shape) != (tensor.dtype, tensor.shape):
            raise HostMemoryError(
                "E168", f"layer {self._layer}: {name} of expert {expert} is not what was expected",
                why=f"{_described([(name, tensor.dtype, tensor.shape)])}, expected: {_described(self._expected or [])}",
                hint="share the tensors that expect was told of",
            )  # fmt: skip
        return view.copy_(tensor)

    def _exchange_names(self) -> list[str]:
        """Every rank's segment name; the collective is also the barrier after which all parts are written."""
        pids = torch.zeros(self._ranks, dtype=torch.int64)
        pids[self._rank] = os.getpid()
        if self._group is not None and self._ranks > 1:
            dist.all_reduce(pids, group=self._group)
        return [segment_name(self._instance, self._part(r), pid=int(pid)) for r, pid in enumerate(pids)]

    def _part(self, rank: int) -> str:
        return f"l{self._layer}r{rank}"


def _remove_own(segment: str, pid: int) -> None:
    """Remove the segment unless this is a fork of the process that made it."""
    if os.getpid() == pid:
        remove_segment(segment)


def _aligned(dtype: torch.dtype, shape: torch.Size) -> int:
    return -(-shape.numel() * dtype.itemsize // _ALIGN) * _ALIGN


def _stride(spec: _Spec) -> int:
    """Bytes of one expert."""
    return sum(_aligned(dtype, shape) for _, dtype, shape in spec)


def _spec_of(weights: Mapping[str, Tensor]) -> _Spec:
    return [(name, weights[name].dtype, weights[name].shape) for name in sorted(weights)]


def _described(spec: _Spec) -> str:
    return ", ".join(f"{name} {str(dtype).removeprefix('torch.')} {tuple(shape)}" for name, dtype, shape in spec)


def _views(memory: mmap.mmap, offset: int, spec: _Spec) -> dict[str, Tensor]:
    views = {}
    for name, dtype, shape in spec:
        views[name] = torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
        offset += _aligned(dtype, shape)
    return views
