"""Tallying what ranks processed against what a source rank asked for."""

from __future__ import annotations

import torch

from moe_eplb.checks.exactly_once import exchange, tally
from tests.support.ranks import run_ranks

IDS = torch.tensor([[3, 1], [0, 3]], dtype=torch.int32)


def rows(*entries: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.int64).reshape(-1, 4)


GOOD = [(0, 0, 7, 3), (0, 1, 2, 1), (1, 0, 0, 0), (1, 1, 3, 3)]  # token, k, slot, expert found in the slot


def test_every_entry_once_in_its_expert() -> None:
    found = tally(IDS, rows(*reversed(GOOD)), slots=8)
    assert (found.expected, found.once, found.missing, found.duplicated) == (4, 4, 0, 0)
    assert (found.wrong_expert, found.invalid_slot, found.first) == (0, 0, "")


def test_missing_duplicated_wrong_and_invalid() -> None:
    assert tally(IDS, rows(*GOOD[1:]), slots=8).missing == 1
    twice = tally(IDS, rows(*GOOD, GOOD[2]), slots=8)
    assert (twice.duplicated, twice.once) == (1, 3)
    assert twice.first == "token 1 k 0 (expert 0) processed 2 times"
    wrong = tally(IDS, rows(*GOOD[:3], (1, 1, 4, 2)), slots=8)
    assert wrong.wrong_expert == 1
    assert wrong.first == "token 1 k 1 of expert 3 was computed in slot 4, which holds expert 2"
    assert tally(IDS, rows(*GOOD[:3], (1, 1, 8, 3)), slots=8).invalid_slot == 1
    assert tally(IDS, rows(*GOOD, (5, 0, 1, 1)), slots=8).invalid_slot == 1


def test_a_rank_without_tokens() -> None:
    found = tally(torch.empty(0, 2, dtype=torch.int32), rows(), slots=8)
    assert (found.expected, found.once, found.missing, found.first) == (0, 0, 0, "")


def swap(rank: int, size: int) -> list[list[int]]:
    import torch.distributed as dist

    # Rank r sends r + 1 rows to each rank: [sender, receiver].
    destination = torch.arange(size).repeat(rank + 1)
    entries = torch.stack([torch.full_like(destination, rank), destination], dim=1)
    arrived = exchange(entries, destination, ranks=size, group=dist.group.WORLD if size > 1 else None)
    return sorted(arrived.tolist())


def test_rows_reach_their_source_rank() -> None:
    results = run_ranks(swap, 3)
    for rank, arrived in enumerate(results):
        assert arrived == sorted([sender, rank] for sender in range(3) for _ in range(sender + 1))
