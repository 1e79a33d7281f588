"""Files of other stacks, made by hand as those stacks make them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.planning.formats.loads import Reading, read_counts
from moe_eplb.planning.formats.placements import read_placement, write_placement
from moe_eplb.planning.loads import LoadSet, Origin, layers_text
from moe_eplb.planning.placements import PlacementSet, require_fit

from .drawn import COUNTS, stat_dump, statistics, vllm_loads

ROOT = Path(__file__).resolve().parents[3]
RECORDED = Path(os.environ.get("EPLB_EXPERT_LOADS", ROOT.parent / "shared" / "data" / "expert_loads"))


def test_statistics_of_tensorrt_llm(tmp_path: Path) -> None:
    ranks = [
        {f"{step}_{layer}": COUNTS[step - 50, i] * (rank + 1) for step in (50, 51) for i, layer in enumerate((3, 60))}
        for rank in range(2)
    ]
    folder = statistics(tmp_path / "s", ranks)
    (folder / "cooccurrence_rank0.safetensors").write_bytes(b"of another tool")
    read = read_counts(folder)
    assert read.counts.tolist() == (3 * COUNTS).tolist()
    assert (read.layer_ids, read.numbered) == ((3, 60), True)
    assert read.origin == Origin(iterations=(50, 51), in_order=True, ranks=2, top_k=2)
    assert any("otherwise that is the number of slots" in note for note in read.notes)


def test_counts_of_slots_are_refused(tmp_path: Path) -> None:
    """With the balancer on, TensorRT-LLM counts slots, and its files do not say so."""
    by_slot = statistics(tmp_path / "a", [{"0_3": [1, 2, 3, 4]}], experts=3)
    as_experts = statistics(tmp_path / "b", [{"0_3": [1, 2, 3, 4]}], experts=4)
    loads = read_counts(as_experts)
    there = PlacementSet(np.array([[0, 1, 2, 0]], np.int32), 2, 3, (3,))
    for refused in (
        lambda: read_counts(by_slot),
        lambda: read_counts(as_experts, Reading(experts=3)),
        lambda: require_fit(loads, there),
    ):
        with pytest.raises(ScenarioError, match="counts of slots, not of experts") as caught:
            refused()
        assert caught.value.code == "E198"
        assert "EPLB" in caught.value.why
        assert "without a load balancer" in caught.value.hint
    with pytest.raises(UsageError, match="of 4 experts, not 5"):
        read_counts(as_experts, Reading(experts=5))


def test_loads_of_vllm(tmp_path: Path) -> None:
    path = vllm_loads(tmp_path / "a.safetensors", {"deepseek": COUNTS[0].astype(np.float32)})
    read = read_counts(path)
    assert (read.counts.tolist(), read.layer_ids, read.numbered) == (COUNTS[:1].tolist(), (0, 1), False)
    assert read.origin.model == "deepseek"
    numbered = read_counts(path, Reading(layer_ids=(3, 5)))
    assert (numbered.layer_ids, numbered.numbered) == ((3, 5), True)
    assert "the model's own numbers of its layers" in read.read.lost
    assert "the model's own numbers of its layers" not in numbered.read.lost
    two = vllm_loads(tmp_path / "b", {"a": COUNTS[0].astype(np.float32), "mtp": COUNTS[1].astype(np.float64)}, None)
    assert read_counts(two, Reading(model="mtp")).counts.tolist() == COUNTS[1:].tolist()
    for model, what in ((None, "several models"), ("b", "no loads of 'b'")):
        with pytest.raises(UsageError, match=what) as caught:
            read_counts(two, Reading(model=model))
        assert caught.value.code == "E196"
        assert "a, mtp" in caught.value.why


def test_numbers_of_layers_that_contradict_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", counts=COUNTS, layer_ids=[3, 7])
    assert read_counts(tmp_path / "a.npz", Reading(layer_ids=(3, 7))).layer_ids == (3, 7)
    for ids in ((1, 2), (3,), (3, 4, 5)):
        with pytest.raises(UsageError) as caught:
            read_counts(tmp_path / "a.npz", Reading(layer_ids=ids))
        assert caught.value.code == "E195"
    np.savez(tmp_path / "b.npz", counts=COUNTS)
    with pytest.raises(UsageError, match="not the layers"):
        read_counts(tmp_path / "b.npz", Reading(layer_ids=(3, 3)))


def test_rows_go_by_order_only_where_numbers_are_missing() -> None:
    slots = np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    counts = np.ones((1, 2, 3), np.int64)
    loads, nameless = LoadSet(counts, (5, 3), "x"), LoadSet(counts, (0, 1), "x", (), False)
    rows = PlacementSet(slots, 1, 3, (0, 1), "", False)
    assert require_fit(loads, rows).slots.tolist() == slots[::-1].tolist()
    assert require_fit(nameless, PlacementSet(slots, 1, 3, (60, 4))).slots.tolist() == slots[::-1].tolist()
    assert require_fit(loads, PlacementSet(slots, 1, 3, (3, 5))).slots.tolist() == slots[::-1].tolist()
    for ids in ((0, 1), (3, 4)):
        with pytest.raises(UsageError, match="not one of these layers"):
            require_fit(loads, PlacementSet(slots, 1, 3, ids))


def test_a_map_of_vllm_for_all_layers_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("[0, 1, 1, 0]")
    assert read_placement(tmp_path / "p", ranks=2).slots.tolist() == [[0, 1, 1, 0]]


def test_mindies_map_without_numbers_of_devices(tmp_path: Path) -> None:
    devices = [{"device_expert": [0, 1]}, {"device_expert": [1, 0]}]
    layers = [{"layer_id": 0, "device_count": 2, "device_list": devices}]
    (tmp_path / "p").write_text(json.dumps({"moe_layer_count": 1, "layer_list": layers}))
    read = read_placement(tmp_path / "p")
    assert (read.slots.tolist(), read.ranks, read.numbered) == ([[0, 1, 1, 0]], 2, False)


def test_a_pattern_of_omni_infer(tmp_path: Path) -> None:
    pattern = np.zeros((2, 1, 3), np.int32)
    pattern[0, 0, [0, 2]] = pattern[1, 0, [1, 2]] = 1
    np.save(tmp_path / "p.npy", pattern)
    read = read_placement(tmp_path / "p.npy")
    assert (read.slots.tolist(), read.ranks, read.experts, read.numbered) == ([[0, 2, 1, 2]], 2, 3, False)
    with pytest.raises(UsageError, match="another number of ranks"):
        read_placement(tmp_path / "p.npy", ranks=4)


def test_tensorrt_llms_file_is_the_one_that_scenarios_take(tmp_path: Path) -> None:
    from moe_eplb.core import config

    placement = PlacementSet(np.array([[0, 1, 1, 2], [2, 1, 0, 2]], np.int32), 2, 3, (3, 5), "")
    read = config.loads(write_placement(placement, "tensorrt_llm")[0].decode(), "x")
    assert read.num_slots == 4
    assert read.initial_global_assignments == {3: [0, 1, 1, 2], 5: [2, 1, 0, 2]}
    (tmp_path / "p").write_text("num_slots: 2\nep_size: 2\ninitial_global_assignments: {0: [0, 1]}\n")
    assert read_placement(tmp_path / "p").ranks == 2
    with pytest.raises(UsageError, match="another number of ranks"):
        read_placement(tmp_path / "p", ranks=1)


def test_loads_of_windows_and_of_tokens(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", counts=COUNTS, layer_ids=[3, 7])
    read = read_counts(tmp_path / "a.npz")
    assert np.array_equal(read.counts, COUNTS)
    assert (read.layer_ids, read.numbered, read.read.form) == ((3, 7), True, "npz")
    ids = np.array([[[0], [1]], [[0], [2]], [[1], [1]], [[2], [0]], [[2], [0]]], np.int32)
    np.savez(tmp_path / "b.npz", topk_ids=ids)
    read = read_counts(tmp_path / "b.npz", Reading(2))
    assert read.counts.tolist() == [[[2, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 1, 0]]]
    assert read.notes == ("1 tokens after the last full window are left out",)
    assert (read.origin.top_k, read.read.left_out, read.numbered) == (1, ("the choices of each token",), False)
    with pytest.raises(ScenarioError, match="fewer tokens"):
        read_counts(tmp_path / "b.npz", Reading(6))


def test_loads_of_a_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "loads.npz", counts=COUNTS)
    read = read_counts(tmp_path)
    assert (read.read.form, read.origin.in_order, read.source) == ("run", True, str(tmp_path))


def test_sglangs_counts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": [[0.0, 0.0], [3.0, 4.0], [5, 6]]}))
    read = read_counts(tmp_path / "a.json")
    assert read.counts.tolist() == [[[3, 4], [5, 6]]]
    assert read.layer_ids == (1, 2)
    assert "1 layers without any load" in read.notes[0]


def test_forms_are_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    stat = stat_dump(tmp_path / "a.json", COUNTS)
    assert read_counts(stat).read.form == "sglang_stat"
    (tmp_path / "b.safetensors").write_text(json.dumps({"logical_count": COUNTS.tolist()}))
    assert read_counts(tmp_path / "b.safetensors").read.form == "sglang"


@pytest.mark.parametrize(
    ("ids", "text"), [((3, 4, 5, 60), "3-5,60"), ((0,), "0"), ((0, 7, 15), "0,7,15"), ((5, 4), "5,4"), ((1, 2), "1-2")]
)
def test_layers_in_short(ids: tuple[int, ...], text: str) -> None:
    assert layers_text(ids) == text


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded loads of real models are not here")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("deepseek_v3_sglang_a.npz", (8, 58, 256)), ("gptoss20b_stream_a.npz", (163, 24, 32)),
        ("gptoss20b_tokens_a.npz", (1, 24, 32)), ("sglang_init_expert_location_prefill_in1024.json", (1, 58, 256)),
    ],
)  # fmt: skip
def test_recorded_loads(name: str, shape: tuple[int, ...]) -> None:
    read = read_counts(RECORDED / name)
    assert read.counts.shape[1:] == shape[1:]
    assert read.counts.shape[0] >= shape[0]
    if shape[1] == 58:
        assert read.layer_ids[0] == 3


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded loads of real models are not here")
def test_a_published_pattern() -> None:
    (path,) = RECORDED.glob("placement_pattern_*.npy")
    read = read_placement(path)
    assert (read.slots.shape, read.ranks, read.experts) == ((58, 256), 16, 256)
    loads = read_counts(RECORDED / "deepseek_v3_sglang_a.npz")
    assert require_fit(loads, read).layer_ids == loads.layer_ids
