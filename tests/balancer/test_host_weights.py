"""The host copy: every rank writes its part and reads all; names, shapes and ownership are checked."""

from __future__ import annotations

import os

import pytest
import torch

from moe_eplb.balancer.host_memory import list_segments, new_instance, remove_segment
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


SPEC = {name: (weight(0, name).dtype, weight(0, name).shape) for name in ("w2", "scale")}


def share_expected(rank: int, size: int, instance: str) -> list[bool]:
    import torch.distributed as dist

    sharer = HostMoeTensorSharer(0, 7, rank=rank, ranks=size, instance=instance, group=dist.group.WORLD)
    sharer.expect(SPEC)
    for expert in sharer.experts_of(rank):
        for name in SPEC:
            given = weight(expert, name)
            sharer.share_host_tensor(expert, name, given)
            given.zero_()  # it was copied: the caller may use its memory again
    sharer.finalize()
    good = [torch.equal(sharer.host_tensor(e, n), weight(e, n)) for e in range(7) for n in SPEC]
    dist.barrier()
    sharer.close()
    return good


def test_expected_weights_are_written_as_they_are_given() -> None:
    instance = new_instance()
    assert run_ranks(share_expected, 2, instance) == [[True] * 14] * 2
    assert not [s for s in list_segments() if instance in s.name]


def one_rank_expecting() -> HostMoeTensorSharer:
    sharer = one_rank()
    sharer.expect(SPEC)
    return sharer


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("w2", torch.zeros(3, 5).bfloat16()), ("w2", torch.zeros(5, 3)), ("w1", torch.zeros(7))],
    ids=["shape", "dtype", "name"],
)
def test_a_tensor_that_was_not_expected(name: str, tensor: torch.Tensor) -> None:
    sharer = one_rank_expecting()
    with pytest.raises(HostMemoryError, match=rf"E168(.|\n)*{name} of expert 1(.|\n)*w2 bfloat16 \(5, 3\)"):
        sharer.share_host_tensor(1, name, tensor)
    sharer.close()


def test_expected_weights_that_were_not_given() -> None:
    sharer = one_rank_expecting()
    for expert in range(2):
        sharer.share_host_tensor(expert, "w2", weight(expert, "w2"))
    with pytest.raises(HostMemoryError, match=r"E167.*expert 0 has other weights than what was expected"):
        sharer.finalize()
    sharer.close()


def test_expected_weights_are_not_given_twice() -> None:
    sharer = one_rank_expecting()
    sharer.share_host_tensor(0, "w2", weight(0, "w2"))
    with pytest.raises(HostMemoryError, match="E165"):
        sharer.share_host_tensor(0, "w2", weight(0, "w2"))
    sharer.close()


def test_expecting_too_late() -> None:
    sharer = one_rank()
    sharer.share_host_tensor(0, "w2", weight(0, "w2"))
    with pytest.raises(HostMemoryError, match=r"E169(.|\n)*shared already"):
        sharer.expect(SPEC)
    sharer = one_rank_expecting()
    with pytest.raises(HostMemoryError, match="E169"):
        sharer.expect(SPEC)
    sharer.close()


def _mine() -> set[str]:
    return {segment.name for segment in list_segments() if segment.owner_pid == os.getpid()}


def test_a_segment_that_was_made_for_expected_weights_goes_without_finalize() -> None:
    before = _mine()
    sharer = one_rank_expecting()
    assert _mine() > before
    sharer.close()
    assert _mine() == before
    sharer.close()


def test_a_segment_goes_with_its_sharer() -> None:
    before = _mine()
    sharer = one_rank_expecting()
    assert _mine() > before
    del sharer
    assert _mine() == before


def test_a_fork_of_its_process_does_not_take_a_segment_along(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _mine()
    sharer = one_rank_expecting()
    [name] = _mine() - before
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        del sharer
    assert _mine() == before | {name}
    remove_segment(name)
