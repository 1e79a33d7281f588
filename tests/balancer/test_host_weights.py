"""The host copy: every rank writes its part and reads all; names, shapes and ownership are checked."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.balancer.host_memory import list_segments, new_instance
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.core.errors import HostMemoryError
from tests.support.ranks import run_ranks


def weight(expert: int, name: str) -> torch.Tensor:
    """A tensor that no other expert or name has."""
    shape = (5, 3) if name == "w2" else (7,)
    return torch.full(shape, expert * 10.0 + len(name), dtype=torch.bfloat16 if name == "w2" else torch.float32)


def share_all(rank: int, size: int, instance: str) -> list[bool]:
    import torch.distributed as dist

    sharer = HostMoeTensorSharer(
        0, 6, rank=rank, ranks=size, instance=instance, group=dist.group.WORLD if size > 1 else None
    )
    for expert in sharer.experts_of(rank):
        for name in ("w2", "scale"):
            sharer.share_host_tensor(expert, name, weight(expert, name))
    sharer.finalize()
    good = [torch.equal(sharer.host_tensor(e, n), weight(e, n)) for e in range(6) for n in ("w2", "scale")]
    if size > 1:
        dist.barrier()
    sharer.close()
    return good


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_reads_every_expert(size: int) -> None:
    instance = new_instance()
    for good in run_ranks(share_all, size, instance):
        assert all(good)
        assert len(good) == 12
    assert not [s for s in list_segments() if instance in s.name]


def one_rank(experts: int = 2) -> HostMoeTensorSharer:
    return HostMoeTensorSharer(3, experts, rank=0, ranks=1, instance=new_instance(), group=None)


def test_sharing_an_expert_of_another_rank() -> None:
    sharer = HostMoeTensorSharer(3, 4, rank=1, ranks=2, instance=new_instance(), group=None)
    with pytest.raises(HostMemoryError, match="layer 3: expert 0 is not shared by rank 1"):
        sharer.share_host_tensor(0, "w2", weight(0, "w2"))


def test_sharing_twice() -> None:
    sharer = one_rank()
    sharer.share_host_tensor(0, "w2", weight(0, "w2"))
    with pytest.raises(HostMemoryError, match="shared twice"):
        sharer.share_host_tensor(0, "w2", weight(0, "w2"))


def test_missing_and_differing_experts() -> None:
    sharer = one_rank()
    sharer.share_host_tensor(0, "w2", weight(0, "w2"))
    with pytest.raises(HostMemoryError, match=r"E166.*\n.*\[1\]"):
        sharer.finalize()
    sharer.share_host_tensor(1, "scale", weight(1, "scale"))
    with pytest.raises(HostMemoryError, match="E167"):
        sharer.finalize()
