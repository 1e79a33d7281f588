"""The ranks of a benchmark, one a GPU, which torchrun has started; without it there is one."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_eplb.device.environment import prepare_process
from moe_eplb.session.groups import Groups, GroupsBySize

__all__ = ["ALONE", "Ranks", "joined"]

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among R, and their process groups."""

    rank: int
    size: int
    groups: Groups

    def slowest(self, samples_ms: dict[str, list[float]]) -> dict[str, list[float]]:
        """Of each sample, the time of the rank that took longest. Collective."""
        if self.size == 1:
            return samples_ms
        every: list[dict[str, list[float]]] = [{}] * self.size
        dist.all_gather_object(every, samples_ms, group=self.groups.checks)
        return {name: [max(of) for of in zip(*(one[name] for one in every), strict=True)] for name in samples_ms}

    def all(self, value: object) -> list[object]:
        """What each rank says, in order of rank. Collective."""
        every: list[object] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(every, value, group=self.groups.checks)
        return every

    def barrier(self) -> None:
        """Return when all ranks have come here and their GPUs are idle."""
        torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier(self.groups.checks)


ALONE = Ranks(0, 1, Groups(None, None, None, None))


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun has started, each with the GPU of its number; one without torchrun."""
    prepare_process()
    gc.collect()
    gc.freeze()  # to go over all that torch holds takes longer than many steps
    if "RANK" not in os.environ:
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo")
    try:
        yield Ranks(rank, size, GroupsBySize(_TIMEOUT_S).of(size, "nccl"))
    finally:
        dist.destroy_process_group()
