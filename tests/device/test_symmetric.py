"""Windows of symmetric memory: when they are made and shared, how rows divide, and who gets none."""

from __future__ import annotations

from collections.abc import Iterator
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
from moe_eplb.device.symmetric import MOST_RANKS, HostSymmetric, Symmetric, Window, shared_by_layers
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def _group(size: int, name: str = "g") -> Any:
    return SimpleNamespace(size=lambda: size, group_name=name)


class Counting(HostSymmetric):
    """Notes the windows that are exchanged and sends nothing."""

    def __init__(self) -> None:
        super().__init__(_group(2), CPU)
        self.seen: list[Window] = []

    def _exchange(self, window: Window) -> None:
        self.seen.append(window)


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
    """Peers may read what was sent until the next exchange is over; so may they after a forward that broke off."""
    symmetric = Counting()
    there, back = symmetric.window("dispatch", 4, 128), symmetric.window("combine", 4, 128)
    for window in (there, back, there, there, back, there):
        symmetric.exchange(window)
    assert [any(window is known for known in (there, back)) for window in symmetric.seen] == [True] * 3 + [False] + [
        True
    ] * 3
    assert all(one is not two for one, two in zip(symmetric.seen, symmetric.seen[1:], strict=False))
    assert not symmetric.seen[3].send_counts.any()


def test_no_window_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = Counting()
    made = symmetric.window("dispatch", 4, 128)
    symmetric._device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert symmetric.window("dispatch", 3, 128) is made
    with pytest.raises(BalancerError, match=r"E212(.|\n)*5 rows"):
        symmetric.window("dispatch", 5, 128)


def _exchanged(rank: int, size: int) -> list[tuple[list[int], list[int], list[list[int]]]]:
    """Two exchanges of rows that say where they come from and go to: counts, first words, counts and offsets."""
    symmetric = get_device("cpu", NullSink()).symmetric(dist.group.WORLD)
    assert get_device("cpu", NullSink()).symmetric(dist.group.WORLD) is symmetric
    window, seen = symmetric.window("rows", 8, symmetric.align), []
    for counts in ([[1, 3], [2, 2]], [[0, 1], [1, 0]]):
        words = [100 * rank + 10 * peer + i for peer in range(size) for i in range(counts[rank][peer])]
        window.send[: len(words), 0] = torch.tensor(words, dtype=torch.int32)
        window.send_counts.copy_(torch.tensor(counts[rank]))
        symmetric._exchange(window)
        received = window.received_counts.tolist()
        seen.append((received, window.received[:6, 0].tolist(), window.counts_and_offsets.tolist()))
    return seen


def test_the_twin_sends_rows_by_the_counts_and_leaves_stale_ones() -> None:
    first, second = run_ranks(_exchanged, 2)
    assert first[0] == ([1, 2], [0, 100, 101, 0, 0, 0], [[1, 2], [0, 1]])
    assert second[0] == ([3, 2], [10, 11, 12, 110, 111, 0], [[3, 2], [0, 3]])
    assert first[1] == ([0, 1], [100, 100, 101, 0, 0, 0], [[0, 1], [0, 0]])
    assert second[1] == ([1, 0], [10, 11, 12, 110, 111, 0], [[1, 0], [0, 1]])


# -- rows that divide ------------------------------------------------------------------------------------------------


class Meta(NvshmemSymmetric):
    """Buffers without memory."""

    def __init__(self, ranks: int) -> None:
        Symmetric.__init__(self, _group(ranks), torch.device("meta"))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")


def _blocks(size: int, ranks: int) -> Iterator[int]:
    """Blocks that torch launches for a send buffer of that many bytes: on one node, over several, and before 2.11."""
    count = -(-size // (16 * 512 * 8))
    count = -(-count // ranks) * ranks
    yield from (min(count, 64), min(count, 16))
    count = next((few for few, below in ((8, 1), (16, 2), (32, 4)) if size < below << 20), 64)
    yield min(count, 16 if ranks <= 16 else 8) if ranks > 8 else count


@pytest.mark.parametrize("rows", [1, 100, 5000])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 12, 16, 64, 512])
def test_a_row_divides_evenly_among_the_blocks_of_a_peer(ranks: int, rows: int) -> None:
    symmetric = Meta(ranks)
    for least in (1, 47, 1800, 3600):
        words = -(-least // symmetric.align) * symmetric.align
        send = symmetric.window("dispatch", rows, words).send
        for blocks in _blocks(4 * send.numel(), ranks):
            assert 4 * words % (16 * max(blocks // ranks, 1)) == 0


def test_blocks_that_the_user_asks_for_divide_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SYMMMEM_NBLOCKS", "26")
    assert 4 * Counting().align % (16 * 13 * 32) == 0


# -- refusals --------------------------------------------------------------------------------------------------------


def test_more_ranks_than_an_exchange_takes_are_refused() -> None:
    with pytest.raises(BalancerError, match=r"E211(.|\n)*513 ranks(.|\n)*at most 512"):
        shared_by_layers(HostSymmetric, _group(MOST_RANKS + 1), CPU)


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
