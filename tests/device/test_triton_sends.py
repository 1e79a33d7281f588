"""Rows that go only to the ranks that need them: what is sent and checked, and kernels that equal their plain twins."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from moe_eplb.device.ops import plain
from moe_eplb.device.ops.plain_sends import needed_by
from tests.device.test_triton_ops import DEVICE, triton_ops

PER_RANK, TOP_K, WIDTH = 3, 3, 5


class Sent(NamedTuple):
    """What one rank sends."""

    rows: torch.Tensor
    place: torch.Tensor
    token_at: torch.Tensor


def _slots(tokens: int, ranks: int, seed: int) -> torch.Tensor:
    """Global ids [T, K], some of no rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, PER_RANK * ranks + 2, (tokens, TOP_K), generator=generator, dtype=torch.int32).to(DEVICE)


def _send(ops: object, tokens: int, ranks: int, block: int, rank: int) -> Sent:
    slots = _slots(tokens, ranks, rank)
    x = torch.arange(tokens * WIDTH, dtype=torch.int32, device=DEVICE).view(tokens, WIDTH) + 10_000 * rank
    scales = torch.rand(tokens, TOP_K, generator=torch.Generator().manual_seed(rank)).to(DEVICE)
    rows = torch.full((ranks * block, 16), 77, dtype=torch.int32, device=DEVICE)
    place, token_at = ops.order_sends(slots, ranks=ranks, slots_per_rank=PER_RANK, block=block)  # type: ignore[attr-defined]
    ops.send_rows((x, scales.view(torch.int32), slots), token_at, rows, rank=rank)  # type: ignore[attr-defined]
    return Sent(rows, place, token_at)


SHAPES = [(0, 2, 4), (1, 2, 1), (7, 2, 7), (30, 3, 40), (30, 2, 1500), (1100, 2, 1100), (3, 64, 3)]


def test_the_order_in_a_block_is_that_of_tokens_and_the_rest_says_so() -> None:
    slots = torch.tensor([[0, 4, 9], [-1, 3, 4], [9, -1, 99], [5, 2, 1]], dtype=torch.int32)
    place, token_at = plain.order_sends(slots, ranks=3, slots_per_rank=3, block=5)
    assert place.tolist() == [[0, -1, -1, 1], [0, 1, -1, 2], [-1] * 4]
    assert token_at.tolist() == [0, 3, -1, -1, -1, 0, 1, 3, -1, -1, *[-1] * 5]
    rows = torch.full((15, 7), 77, dtype=torch.int32)
    plain.send_rows([slots[:, :1], slots[:, 1:2], slots[:, 2:]], token_at, rows, rank=1)
    assert rows[1].tolist() == [5, 2, 1, 3, 1, 1, 77]
    assert rows[5].tolist() == [0, 4, 9, 0, 1, 5, 77]
    assert rows[8].tolist() == rows[14].tolist() == [77, 77, -1, -1, -1, -1, 77]


@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES)
def test_sent_rows(tokens: int, ranks: int, block: int) -> None:
    wanted, got = (_send(ops, tokens, ranks, block, ranks - 1) for ops in (plain, triton_ops))
    for theirs, ours in zip(wanted, got, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)
    counts = (wanted.token_at.view(ranks, block) >= 0).sum(dim=1)
    assert torch.equal(counts, needed_by(_slots(tokens, ranks, ranks - 1), PER_RANK, ranks).sum(dim=1))


def _exchange(sent: list[Sent], rank: int, block: int) -> torch.Tensor:
    """Rows that a rank receives."""
    return torch.cat([rows[rank * block : (rank + 1) * block] for rows, _, _ in sent])


@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES[:-1])
@pytest.mark.parametrize("disturbed", ["no", "by a line", "by a block", "of another rank"])
def test_arrived_rows(tokens: int, ranks: int, block: int, disturbed: str) -> None:
    sent = [_send(plain, tokens, ranks, block, rank) for rank in range(ranks)]
    for rank in range(ranks):
        rows = _exchange(sent, (rank + 1) % ranks if disturbed == "of another rank" else rank, block)
        by = {"by a line": 1, "by a block": block}.get(disturbed, 0)
        rows = rows.roll(by, dims=0)
        scales, integers = rows[:, WIDTH : WIDTH + TOP_K].view(torch.float32), rows[:, WIDTH + TOP_K : 14]
        sizes = {"rank": rank, "block": block, "slots_per_rank": PER_RANK}
        wanted, got = (ops.arrive(scales, integers, **sizes) for ops in (plain, triton_ops))
        for theirs, ours in zip(wanted, got, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        used = integers[:, -1] >= 0
        assert (got.slots[~used] == -1).all()
        assert torch.equal(got.marks, integers[:, -2:])
        assert got.scales[~used].isnan().all()
        if disturbed != "no":
            assert got.scales.isnan().all()
            assert (got.slots[used] == 0).all()
        else:
            assert got.scales[used].isfinite().all()
            here = (got.slots[used] >= 0) & (got.slots[used] < PER_RANK)
            assert here.any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "ranks", "block"), SHAPES)
def test_returned_rows(tokens: int, ranks: int, block: int, dtype: torch.dtype) -> None:
    rank = ranks - 1
    sent = _send(plain, tokens, ranks, block, rank)
    generator = torch.Generator().manual_seed(5)
    memory = torch.randn(ranks * block, 24, generator=generator).to(dtype).to(DEVICE)
    marks = sent.rows[:, WIDTH + 2 * TOP_K + 1 :][:, :2]
    used = (sent.token_at >= 0).nonzero().flatten()
    wrong = int(used[-1]) if len(used) else -1
    for spoiled in (False, True):
        hit = torch.zeros(tokens, dtype=torch.bool)
        if spoiled and wrong >= 0:
            marks[wrong, 1] += 1
            hit[int(sent.token_at[wrong])] = True
        arguments = (memory[:, :20], marks, sent.place)
        wanted, got = (ops.add_returned(*arguments, rank=rank, block=block) for ops in (plain, triton_ops))
        # The interpreter cuts off where a GPU rounds.
        near = 0 if dtype is torch.float32 or DEVICE == "cuda" else 1e-2
        torch.testing.assert_close(got, wanted, rtol=near, atol=near, equal_nan=True)
        assert torch.equal(got.isnan().all(dim=1).cpu(), hit)
        assert torch.equal(got.isnan().any(dim=1).cpu(), hit)


@pytest.mark.parametrize("send", [plain.send_rows, triton_ops.send_rows])
@pytest.mark.parametrize("tokens", [(2, 2, 3), (2, 2, 2)])
def test_columns_that_do_not_fit_are_refused(send: Any, tokens: tuple[int, ...]) -> None:
    """Words beyond a row would be the next one's."""
    columns = [torch.zeros(count, 2, dtype=torch.int32, device=DEVICE) for count in tokens]
    rows = torch.zeros(4, 8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="and 3 words do not fit rows"):
        send(columns, torch.zeros(4, dtype=torch.int32, device=DEVICE), rows, rank=0)
