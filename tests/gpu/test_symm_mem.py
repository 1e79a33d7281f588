"""On two GPUs or more, dispatch through NVSHMEM gives the bits of the all-to-all: on a busy GPU, and in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory

from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device, ops
from moe_eplb.moe.dispatch import AllToAll, Dispatcher, SymmMem
from moe_eplb.moe.grouping import sum_over_k
from tests.support.ranks import run_ranks

GPUS = torch.cuda.device_count()
HIDDEN, TOP_K, PER_RANK = 1024, 4, 6
TOKENS = (1, 64, 700, 3)

pytestmark = pytest.mark.skipif(
    GPUS < 2 or not _symmetric_memory.is_nvshmem_available(), reason="needs two GPUs and NVSHMEM"
)


def _inputs(rank: int, size: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().cuda()
    slots = torch.randint(-1, PER_RANK * size + 1, (tokens, TOP_K), generator=generator, dtype=torch.int32).cuda()
    return x, slots, torch.rand(tokens, TOP_K, generator=generator).cuda()


def _forward(dispatcher: Dispatcher, given: tuple[torch.Tensor, ...], tokens: list[int]) -> torch.Tensor:
    x, slots, scales = given
    exchange = dispatcher.prepare(slots, slots, None, tokens)
    received = exchange.dispatch(x, scales)
    rows, position, _ = ops.permute_rows(received.hidden, received.local_slots, PER_RANK, None, received.entries)
    return exchange.combine(sum_over_k(rows, position, received.scales, exchange.partial_dtype))


def _dispatchers(rank: int, size: int) -> tuple[AllToAll, SymmMem]:
    device = get_device("cuda", NullSink(), rank=rank)
    group: Any = dist.new_group(list(range(size)), backend="nccl")
    sizes: Any = {"slots_per_rank": PER_RANK, "hidden_size": HIDDEN, "top_k": TOP_K, "dtype": torch.bfloat16}
    return AllToAll(group, **sizes), SymmMem(group, symmetric=device.symmetric(group), static_shapes=True, **sizes)


def _eager(rank: int, size: int, rounds: int) -> int:
    """How many of the forwards differ, beside work that keeps all multiprocessors busy."""
    exact, ours = _dispatchers(rank, size)
    beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    matrix, different = torch.randn(4096, 4096, device="cuda").bfloat16(), 0
    for seed in range(rounds):
        tokens = [TOKENS[(seed + peer) % len(TOKENS)] for peer in range(size)]
        given = _inputs(rank, size, tokens[rank], seed)
        wanted = _forward(exact, given, tokens)
        with torch.cuda.stream(beside):
            for _ in range(4):
                matrix @ matrix
        different += not torch.equal(_forward(ours, given, tokens), wanted)
    return different


def _replayed(rank: int, size: int, rounds: int) -> int:
    """How many of the replays differ."""
    exact, ours = _dispatchers(rank, size)
    tokens, different = [64 + 3 * peer for peer in range(size)], 0
    given = _inputs(rank, size, tokens[rank], 0)
    _forward(ours, given, tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _forward(ours, given, tokens)
    for seed in range(rounds):
        new = _inputs(rank, size, tokens[rank], seed)
        for old, now in zip(given, new, strict=True):
            old.copy_(now)
        graph.replay()
        different += not torch.equal(y, _forward(exact, new, tokens))
    return different


@pytest.mark.parametrize("run", [_eager, _replayed])
def test_outputs_are_those_of_the_all_to_all_bit_for_bit(run: Any) -> None:
    assert run_ranks(run, GPUS, 200, timeout=110) == [0] * GPUS
