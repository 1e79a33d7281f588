"""Rows that go only to the ranks that need them: what is sent and checked, and kernels that equal their plain twins."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from moe_eplb.device.ops import plain
from moe_eplb.device.ops.plain_sends import needed_by
from tests.device.test_triton_ops import DEVICE, triton_ops

PER_RANK, TOP_K, WIDTH = 3, 3, 5


class Sent(NamedTuple):
    """What one rank sends."""

    rows: torch.Tensor
    counts: torch.Tensor
    position: torch.Tensor
    token_at: torch.Tensor


def _slots(tokens: int, ranks: int, seed: int) -> torch.Tensor:
    """Global ids [T, K], some of no rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, PER_RANK * ranks + 2, (tokens, TOP_K), generator=generator, dtype=torch.int32).to(DEVICE)


def _send(ops: object, tokens: int, ranks: int, block: int, rank: int) -> Sent:
    slots = _slots(tokens, ranks, rank)
    counts = torch.full((ranks,), 99, dtype=torch.int64, device=DEVICE)
    x = torch.arange(tokens * WIDTH, dtype=torch.int32, device=DEVICE).view(tokens, WIDTH) + 10_000 * rank
    scales = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    rows = torch.full((ranks * block, 16), 77, dtype=torch.int32, device=DEVICE)
    position, token_at = ops.order_sends(slots, counts, slots_per_rank=PER_RANK, block=block)  # type: ignore[attr-defined]
    ops.send_rows((x, scales.view(torch.int32), slots), token_at, counts, rows, rank=rank, block=block)  # type: ignore[attr-defined]
    return Sent(rows, counts, position, token_at)


SHAPES = [(0, 2, 4), (1, 2, 1), (7, 2, 7), (30, 3, 40), (1100, 2, 1100), (3, 64, 3)]


def test_the_order_is_that_of_ranks_and_then_of_tokens() -> None:
    slots = torch.tensor([[0, 4, 9], [-1, 3, 4], [9, -1, 99], [5, 2, 1]], dtype=torch.int32)
    counts = torch.zeros(3, dtype=torch.int64)
    position, token_at = plain.order_sends(slots, counts, slots_per_rank=3, block=5)
    assert counts.tolist() == [2, 3, 0]
    assert position.tolist() == [[0, -1, -1, 1], [2, 3, -1, 4], [-1] * 4]
    assert token_at[:5].tolist() == [0, 3, 0, 1, 3]
    rows = torch.full((15, 7), 77, dtype=torch.int32)
    plain.send_rows([slots[:, :1], slots[:, 1:2], slots[:, 2:]], token_at, counts, rows, rank=1, block=5)
    assert rows[1].tolist() == [5, 2, 1, 3, 1, 1, 77]
    assert rows[2].tolist() == [0, 4, 9, 0, 1, 5, 77]
    assert rows[5].tolist() == [77] * 5 + [-1, 77]


@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES)
def test_sent_rows(tokens: int, ranks: int, block: int) -> None:
    wanted, got = (_send(ops, tokens, ranks, block, ranks - 1) for ops in (plain, triton_ops))
    assert torch.equal(got.counts, wanted.counts)
    assert torch.equal(wanted.counts, needed_by(_slots(tokens, ranks, ranks - 1), PER_RANK, ranks).sum(dim=1))
    assert torch.equal(got.position, wanted.position)
    total = int(wanted.counts.sum())
    assert torch.equal(got.token_at[:total], wanted.token_at[:total])
    assert torch.equal(got.rows, wanted.rows)


def _exchange(sent: list[Sent], rank: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that a rank receives, behind them stale ones of all sorts, and their counts."""
    parts = [rows.split([*counts.tolist(), len(rows) - int(counts.sum())])[rank] for rows, counts, _, _ in sent]
    stale = torch.randint(-3, 9, (len(sent) * block, 16), generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    rows = torch.cat([*parts, stale])[: len(stale)]
    return rows, torch.tensor([len(part) for part in parts], device=DEVICE)


@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES[:-1])
@pytest.mark.parametrize("disturbed", [False, True])
def test_arrived_rows(tokens: int, ranks: int, block: int, disturbed: bool) -> None:
    sent = [_send(plain, tokens, ranks, block, rank) for rank in range(ranks)]
    for rank in range(ranks):
        rows, counts = _exchange(sent, rank, block)
        total = int(counts.sum())
        if disturbed:
            rows[:total] = rows[:total].roll(1, dims=0)
        scales, integers = rows[:, WIDTH : WIDTH + TOP_K].view(torch.float32), rows[:, WIDTH + TOP_K : 14]
        sizes = {"rank": rank, "block": block, "slots_per_rank": PER_RANK}
        wanted, got = (ops.arrive(scales, integers, counts, **sizes) for ops in (plain, triton_ops))
        for theirs, ours in zip(wanted, got, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert (got.slots[total:] == -1).all()
        assert (got.marks[total:, 1] == -1).all()
        if disturbed and total > 1:
            assert got.scales.isnan().all()
            assert (got.slots[:total] == 0).all()
        elif not disturbed:
            assert got.scales[:total].isfinite().all()
            here = (got.slots[:total] >= 0) & (got.slots[:total] < PER_RANK)
            assert here.any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES)
def test_returned_rows(tokens: int, ranks: int, block: int, dtype: torch.dtype) -> None:
    rank = ranks - 1
    sent = _send(plain, tokens, ranks, block, rank)
    generator = torch.Generator().manual_seed(5)
    memory = torch.randn(ranks * block, 24, generator=generator).to(dtype).to(DEVICE)
    marks = sent.rows[:, WIDTH + 2 * TOP_K + 1 :][:, :2]
    wrong = int(sent.position.max()) if tokens else -1
    for spoiled in (False, True):
        if spoiled and wrong >= 0:
            marks[wrong, 1] += 1
        arguments = (memory[:, :20], marks, sent.position, sent.counts)
        wanted, got = (ops.add_returned(*arguments, rank=rank, block=block) for ops in (plain, triton_ops))
        # The interpreter cuts off where a GPU rounds.
        near = 0 if dtype is torch.float32 or DEVICE == "cuda" else 1e-2
        torch.testing.assert_close(got, wanted, rtol=near, atol=near, equal_nan=True)
        hit = (sent.position == wrong).any(dim=0) if spoiled and wrong >= 0 else torch.zeros(tokens, dtype=torch.bool)
        assert torch.equal(got.isnan().all(dim=1).cpu(), hit.cpu())
        assert torch.equal(got.isnan().any(dim=1).cpu(), hit.cpu())
