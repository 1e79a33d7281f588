"""The helper that runs ranks: results, failures, deaths and time limits."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def _add(rank: int, size: int, amount: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([rank + amount])
    dist.all_reduce(total)
    return size, total


def _fail_on_rank_1(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("told to")
    dist.barrier()


def _die_on_rank_1(rank: int, size: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def _hang(rank: int, size: int) -> None:
    threading.Event().wait()


def test_results_come_back_by_rank() -> None:
    results = run_ranks(_add, 3, 10)
    assert [(size, total.tolist()) for size, total in results] == [(3, [33])] * 3


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1: (.|\n)*ValueError: told to"):
        run_ranks(_fail_on_rank_1, 2, timeout=20)


def test_a_dying_rank_is_reported_without_waiting_for_the_limit() -> None:
    started = time.monotonic()
    with pytest.raises(RankError):
        run_ranks(_die_on_rank_1, 2, timeout=60)
    assert time.monotonic() - started < 30


def test_a_rank_that_hangs_is_killed_at_the_limit() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] did not finish in time"):
        run_ranks(_hang, 2, timeout=1)
