from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moe_eplb.core import workload
from tests.support.workloads import counts, ids, make


def save_ids(folder: Path, tokens: int) -> np.ndarray:
    """Write `tokens` tokens of which each has its own ids."""
    recorded = np.stack([np.stack([np.arange(t, t + 4) % 16] * 2) for t in range(tokens)]).astype(np.uint8)
    np.savez(folder / "ids.npz", topk_ids=recorded)
    return recorded


def test_recorded_ids_are_dealt_in_order(tmp_path: Path) -> None:
    recorded = save_ids(tmp_path, 20)
    scenario = make(f"{{kind: recorded, tokens_per_rank: [3, 2], path: {tmp_path / 'ids.npz'}}}")
    assert not workload.is_drawn(scenario)
    assert np.array_equal(ids(scenario, 2, 1, 0), recorded[10:13, 1])
    assert np.array_equal(ids(scenario, 2, 1, 1), recorded[13:15, 1])


@pytest.mark.parametrize("steps", ["decode", "prefill", "mixed", "generate"])
def test_recorded_ids_are_dealt_whatever_the_steps(tmp_path: Path, steps: str) -> None:
    recorded = save_ids(tmp_path, 60)
    prompt = "" if steps == "decode" else ", prompt_tokens: 2"
    work = f"{{kind: recorded, tokens_per_rank: [3, 2], steps: {steps}{prompt}, path: {tmp_path / 'ids.npz'}}}"
    scenario = make(work, iterations=5)
    dealt = np.concatenate([ids(scenario, iteration, 0, rank) for iteration in range(5) for rank in range(2)])
    assert np.array_equal(dealt, recorded[: len(dealt), 0])
    assert len(dealt) == {"decode": 25, "prefill": 50, "mixed": 35, "generate": 30}[steps]


def test_repeats_of_a_layer_get_the_same_recorded_ids(tmp_path: Path) -> None:
    save_ids(tmp_path, 20)
    np.savez(tmp_path / "counts.npz", counts=np.arange(32).reshape(1, 2, 16))
    for name in ("ids", "counts"):
        scenario = make(f"{{kind: recorded, tokens_per_rank: 8, path: {tmp_path / name}.npz}}")
        assert np.array_equal(ids(scenario, 0, 1, 1, 0), ids(scenario, 0, 1, 1, 3))


def test_recorded_counts_drive_the_draw_window_by_window(tmp_path: Path) -> None:
    windows = np.zeros((2, 2, 16), dtype=np.int64)
    windows[0, :, :2], windows[1, :, 4:6] = [30, 10], [10, 30]
    np.savez(tmp_path / "counts.npz", counts=windows)
    scenario = make(f"{{kind: recorded, tokens_per_rank: 1000, path: {tmp_path / 'counts.npz'}}}", top_k=1)
    for iteration in range(3):
        share = counts(scenario, iteration) / 2000
        assert share == pytest.approx(windows[iteration % 2, 0] / 40, abs=0.04)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "ids.npz"
    seen = []
    for first in (0, 1):
        np.savez(path, topk_ids=np.full((4, 2, 1), first, dtype=np.uint8))
        os.utime(path, ns=(first, first))
        seen.append(int(ids(make(f"{{kind: recorded, tokens_per_rank: 2, path: {path}}}", top_k=1))[0, 0]))
    assert seen == [0, 1]
