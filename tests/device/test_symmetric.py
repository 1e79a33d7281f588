"""Windows of symmetric memory: when they are made and shared, what an exchange moves, and who gets none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.device.nvshmem import NvshmemSymmetric
from moe_eplb.device.symmetric import HostSymmetric, shared_by_layers
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def _group(size: int, name: str = "g") -> Any:
    return SimpleNamespace(size=lambda: size, group_name=name)


class Counting(HostSymmetric):
    """Notes the buffers that are exchanged and sends nothing."""

    def __init__(self) -> None:
        super().__init__(_group(2), CPU)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _exchange(self, send: torch.Tensor, received: torch.Tensor) -> None:
        self.seen.append((send, received))


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_grow_and_serve_whatever_fits() -> None:
    symmetric = Counting()
    first = symmetric.window("dispatch", 5, 128)
    assert first.send.shape == first.received.shape == (8, 128)
    assert symmetric.window("dispatch", 8, 128) is first
    assert symmetric.window("combine", 8, 128) is not first
    assert symmetric.window("dispatch", 8, 256) is not first
    second = symmetric.window("dispatch", 9, 128)
    assert len(second.send) == 16
    assert symmetric.window("dispatch", 1, 128) is second


def test_a_window_is_never_used_twice_in_a_row() -> None:
    """A peer may begin an exchange before we have read what came by the last, also after a forward that broke off."""
    symmetric = Counting()
    there, back = symmetric.window("dispatch", 4, 128), symmetric.window("combine", 4, 128)
    for window in (there, back, there, there, back, there):
        symmetric.exchange(window, 4)
    known = [window.received.data_ptr() for window in (there, back)]
    seen = [known.index(at) if (at := received.data_ptr()) in known else "pause" for _, received in symmetric.seen]
    assert seen == [0, 1, 0, "pause", 0, 1, 0]
    assert all(len(send) == len(received) == 2 for send, received in symmetric.seen[3:4])


def test_an_exchange_takes_rows_from_the_front_and_none_at_all_where_there_are_none() -> None:
    symmetric = Counting()
    window = symmetric.window("dispatch", 6, 16)
    for rows in (4, 0):
        symmetric.exchange(window, rows)
    ((send, received),) = symmetric.seen
    assert send.shape == received.shape == (4, 16)
    assert (send.data_ptr(), received.data_ptr()) == (window.send.data_ptr(), window.received.data_ptr())


def test_more_than_nvshmem_can_count_is_refused() -> None:
    symmetric = Counting()
    with pytest.raises(BalancerError, match=r"E213(.|\n)*2147483648 bytes(.|\n)*dispatch: alltoall"):
        symmetric.window("dispatch", 1 << 20, 512)


def test_a_window_is_never_larger_than_one_may_be() -> None:
    class Measuring(Counting):
        def _empty(self, shape: tuple[int, int]) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device="meta")

    rows = (2**31 - 1) // (4 * 3616)
    for asked in (rows // 2 + 9, rows):
        window = Measuring().window("dispatch", asked, 3616)
        assert asked <= len(window.send) <= rows


def test_no_window_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = Counting()
    made = symmetric.window("dispatch", 4, 128)
    symmetric._device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert symmetric.window("dispatch", 3, 128) is made
    with pytest.raises(BalancerError, match=r"E212(.|\n)*5 rows"):
        symmetric.window("dispatch", 5, 128)


def _exchanged(rank: int, size: int) -> list[list[int]]:
    """First words after two exchanges of rows that say where they come from and go to."""
    symmetric = get_device("cpu", NullSink()).symmetric(dist.group.WORLD)
    assert get_device("cpu", NullSink()).symmetric(dist.group.WORLD) is symmetric
    window, seen = symmetric.window("rows", 8, 4), []
    window.received.zero_()
    for block in (3, 1):
        words = [100 * rank + 10 * peer + i for peer in range(size) for i in range(block)]
        window.send[: len(words), 0] = torch.tensor(words, dtype=torch.int32)
        symmetric.exchange(window, len(words))
        seen.append(window.received[:, 0].tolist())
    return seen


def test_the_twin_sends_equal_blocks_and_leaves_stale_rows() -> None:
    first, second = run_ranks(_exchanged, 2)
    assert first == [[0, 1, 2, 100, 101, 102, 0, 0], [0, 100, 2, 100, 101, 102, 0, 0]]
    assert second == [[10, 11, 12, 110, 111, 112, 0, 0], [10, 110, 12, 110, 111, 112, 0, 0]]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_name_that_comes_again_with_another_group_is_another() -> None:
    group = _group(2, "again")
    first = shared_by_layers(HostSymmetric, group, CPU)
    assert shared_by_layers(HostSymmetric, group, CPU) is first
    assert shared_by_layers(HostSymmetric, _group(2, "again"), CPU) is not first


def _no_backend(name: str) -> None:
    raise RuntimeError("the backend was chosen already\nC++ frames")


@pytest.mark.parametrize(
    ("there", "backend", "world", "why"),
    [
        (False, "nccl", 2, "no NVSHMEM here"),
        (True, "gloo", 2, "may share GPUs"),
        (True, "nccl", 4, "all 4 ranks at once, and the group has 2"),
        (True, "nccl", 2, "was chosen already"),
    ],
)
def test_nvshmem_that_cannot_be_had_is_an_error(
    there: bool, backend: str, world: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_symmetric_memory, "is_nvshmem_available", lambda: there)
    monkeypatch.setattr(_symmetric_memory, "get_backend", lambda device: "CUDA")
    monkeypatch.setattr(_symmetric_memory, "set_backend", _no_backend)
    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    with pytest.raises(BalancerError, match=rf"E211(.|\n)*{why}(.|\n)*dispatch: alltoall"):
        NvshmemSymmetric(_group(2), CPU)
