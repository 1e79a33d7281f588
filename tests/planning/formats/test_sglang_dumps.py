"""SGLang's recordings, made by hand as its recorder makes them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.core.errors import ScenarioError
from moe_eplb.planning.formats.loads import read_counts
from moe_eplb.planning.formats.placements import read_placement
from moe_eplb.planning.loads import Origin

from .drawn import COUNTS, FILES, per_pass_dump, stat_dump

SLOTS = [[0, 1, 2, 0], [2, 2, 1, 0], [0, 1, 2, 1]]
"""Of a dense layer and two with three experts."""


def test_a_stat_dump_of_sglang(tmp_path: Path) -> None:
    rows = np.zeros((4, 4, 3), np.int32)
    rows[:2, 1:3] = COUNTS
    read = read_counts(stat_dump(tmp_path / "expert_distribution_recorder_1.pt", rows))
    assert (read.read.form, read.layer_ids, read.numbered) == ("sglang_stat", (1, 2), True)
    assert read.counts.tolist() == COUNTS.tolist()
    assert read.notes == (
        "2 steps without any load were never filled",
        "2 layers without any load are taken for dense ones",
    )
    assert "the order of the windows in time" in read.read.lost
    full = read_counts(stat_dump(tmp_path / "full.pt", rows[:2, 1:3], average_utilization_rate_over_window=0.5))
    assert "a full ring of steps begins anywhere: the order of the windows may be rotated" in full.notes
    assert full.origin.in_order is None
    for dtype in (np.float16, np.float32, np.uint8, np.int64):
        one = stat_dump(tmp_path / "one.pt", COUNTS[0].astype(dtype))
        assert read_counts(one).counts.tolist() == COUNTS[:1].tolist()


def test_tensors_of_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    """Recorders save maps where they lie."""
    stat_dump(tmp_path / "a.pt", COUNTS)
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w") as moved:
        for part in whole.infolist():
            content = whole.read(part)
            if part.filename.endswith("data.pkl"):
                assert content.count(b"X\x03\x00\x00\x00cpu") == 1
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            moved.writestr(part.filename, content)
    assert read_counts(tmp_path / "b.pt").counts.tolist() == COUNTS.tolist()


def test_per_pass_dumps_of_all_ranks(tmp_path: Path) -> None:
    zero, first, second = [0, 0, 0, 0], [1, 2, 3, 4], [5, 0, 1, 0]
    one, two = [zero, first, second], [zero, second, first]
    per_pass_dump(tmp_path / "r_1.5_0.pt", 0, SLOTS, [(4, one), (5, two)])
    per_pass_dump(tmp_path / "r_1.7_1.pt", 1, SLOTS, [(5, one), (6, two)])
    read = read_counts(tmp_path)
    assert read.read.form == "sglang_per_pass"
    assert read.layer_ids == (1, 2)
    assert read.origin == Origin(iterations=(5,), in_order=True, ranks=2)
    summed = np.array([[6, 2, 4, 4], [6, 2, 4, 4]])
    # Layer 1 holds experts 2 2 1 0, layer 2 experts 0 1 2 1.
    assert read.counts.tolist() == [[[4, 4, 8], [6, 6, 4]]]
    assert read.counts.sum() == summed.sum()
    assert "2 forward passes that some ranks lack are left out" in read.notes
    assert any("by the last placement" in note for note in read.notes)
    assert read.read.left_out == ("the counts of each rank alone",)
    alone = read_counts(tmp_path / "r_1.7_1.pt")
    assert alone.origin.iterations == (5, 6)
    assert "the counts are those of rank 1 alone: give the folder with all ranks' files" in alone.notes


@FILES
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 999))
def test_counts_of_slots_become_those_of_experts(
    tmp_path: Path, ranks: int, layers: int, experts: int, spare: int, seed: int
) -> None:
    """Against one slot, pass and rank after the other."""
    rng = np.random.default_rng(seed)
    spares = rng.integers(0, experts, (layers, spare))
    slots = np.array([rng.permutation([*range(experts), *row]) for row in spares.tolist()])
    counts = rng.integers(0, 9, (ranks, 2, layers, experts + spare)) + 1
    expected = np.zeros((2, layers, experts), int)
    for (_, window, layer, slot), count in np.ndenumerate(counts):
        expected[window, layer, slots[layer, slot]] += count
    for old in tmp_path.glob("*.pt"):
        old.unlink()
    for rank in range(ranks):
        per_pass_dump(tmp_path / f"{rank}.pt", rank, slots, [(9 + w, counts[rank, w]) for w in (1, 0)])
    read = read_counts(tmp_path)
    assert read.counts.tolist() == expected.tolist()
    assert read.origin.iterations == (9, 10)


def test_gatherers_of_one_pass_are_summed(tmp_path: Path) -> None:
    records = [
        {"forward_pass_id": 3, "rank": 0, "gatherer_key": key, "global_physical_count": torch.tensor([[1, 2]])}
        for key in ("child_a", "child_b")
    ]
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor([[1, 0]])}, tmp_path / "a.pt")
    assert read_counts(tmp_path / "a.pt").counts.tolist() == [[[4, 2]]]


def test_dumps_of_mode_per_token_are_read_for_their_counts(tmp_path: Path) -> None:
    record = {
        "forward_pass_id": 3, "rank": 0, "gatherer_key": "primary", "input_ids": [1, 2], "forward_mode": 1,
        "global_physical_count": torch.tensor([[1, 3]]), "topk_ids_of_layer": torch.tensor([[[0, 1], [1, -1]]]),
    }  # fmt: skip
    torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor([[1, 0]])}, tmp_path / "a.pt")
    read = read_counts(tmp_path / "a.pt")
    assert read.counts.tolist() == [[[3, 1]]]
    assert "the choices of each token (mode per_token) are there, but not kept" in read.notes


def test_the_last_map_of_a_dump_is_a_placement(tmp_path: Path) -> None:
    dump = per_pass_dump(tmp_path / "a.pt", 0, SLOTS, [(1, np.ones((3, 4), int))])
    placement = read_placement(dump, ranks=2)
    assert (placement.slots.tolist(), placement.experts, placement.numbered) == (SLOTS, 3, True)
    torch.save({"physical_to_logical_map": torch.tensor(SLOTS)}, tmp_path / "b.pt")
    assert read_placement(tmp_path / "b.pt", ranks=2).slots.tolist() == SLOTS
    with pytest.raises(ScenarioError, match="list of rows"):
        read_placement(stat_dump(tmp_path / "c.pt", COUNTS), ranks=2)
