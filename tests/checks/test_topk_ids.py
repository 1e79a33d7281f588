"""Chosen ids as a file that a recorded workload reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moe_eplb.checks import TopkIds


def test_chunks_are_joined_and_of_repeats_the_first_is_kept(tmp_path: Path) -> None:
    ids = TopkIds([1, 2])
    plain = [torch.tensor([[0, 1]]), torch.tensor([[2, 3]])]
    ids.append([plain, [torch.tensor([[4, 5]]), torch.tensor([[6, 7]]), *plain]])
    ids.append([[torch.tensor([[1, 0]])], [torch.tensor([[5, 4]]), torch.tensor([[0, 2]])]])
    ids.save(tmp_path / "ids.npz")
    with np.load(tmp_path / "ids.npz") as file:
        assert file["tokens"].tolist() == [2, 1]
        assert file["topk_ids"].tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[1, 0], [5, 4]]]
