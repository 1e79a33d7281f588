"""Loads and placements in files: round trips, what is lost, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import EplbError, ScenarioError, UsageError
from moe_eplb.planning.formats.placements import FORMS, read_placement, write_placement
from moe_eplb.planning.loads import LoadSet, PlacementSet, read_counts, require_fit

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(os.environ.get("EPLB_EXPERT_LOADS", ROOT.parent / "shared" / "data" / "expert_loads"))
_FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def placements(draw: st.DrawFn) -> PlacementSet:
    """Without two replicas of an expert on a rank; every expert has a slot."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    per_rank = draw(st.integers(-(-experts // ranks), experts))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    layers = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True))
    rows = []
    for _ in layers:
        spread = np.arange(ranks * per_rank) % experts
        held = [set(spread[r * per_rank : (r + 1) * per_rank].tolist()) for r in range(ranks)]
        filled = [[*h, *[e for e in range(experts) if e not in h][: per_rank - len(h)]] for h in held]
        rows.append([e for h in filled for e in rng.permutation(h).tolist()])
    return PlacementSet(np.array(rows, np.int32), ranks, experts, tuple(sorted(layers)), "drawn")


@_FILES
@given(placements(), st.sampled_from(sorted(FORMS)))
def test_every_form_reads_back(tmp_path: Path, placement: PlacementSet, form: str) -> None:
    text, report = write_placement(placement, form)
    path = tmp_path / "p"
    path.write_text(text)
    again = read_placement(path, ranks=placement.ranks, experts=placement.experts)
    loads = LoadSet(np.ones((1, len(placement.layer_ids), placement.experts), np.int64), placement.layer_ids, "x")
    fitted = require_fit(loads, again)
    assert np.array_equal(fitted.slots, placement.slots)
    assert (fitted.ranks, fitted.experts, fitted.layer_ids) == (placement.ranks, placement.experts, placement.layer_ids)
    if form == "json":
        assert report.lost == ()
        assert read_placement(path).slots.shape == placement.slots.shape
    else:
        assert report.lost


def test_what_is_lost_is_named() -> None:
    placement = PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,), "")
    assert "3 rows of layers without experts" in "; ".join(write_placement(placement, "sglang")[1].lost)
    assert "the layers' own numbers" in "; ".join(write_placement(placement, "vllm")[1].lost)
    assert "number of ranks" in "; ".join(write_placement(placement, "tensorrt_llm")[1].lost)
    twice = PlacementSet(np.array([[0, 0, 1, 1]], np.int32), 2, 2, (0,), "")
    with pytest.raises(UsageError, match="two replicas"):
        write_placement(twice, "ascend")


def test_tensorrt_llms_file_is_the_one_that_scenarios_take(tmp_path: Path) -> None:
    from moe_eplb.core import config

    placement = PlacementSet(np.array([[0, 1, 1, 2], [2, 1, 0, 2]], np.int32), 2, 3, (3, 5), "")
    read = config.loads(write_placement(placement, "tensorrt_llm")[0], "x")
    assert read.num_slots == 4
    assert read.initial_global_assignments == {3: [0, 1, 1, 2], 5: [2, 1, 0, 2]}


_DEVICES = [{"device_expert": [0]}]
_GOOD = json.loads(write_placement(PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,), "x"), "json")[0])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "E0"), ("{", "no JSON"), ("[]", "list of rows"), ("[[]]", "list of rows"), ("[[0, 1], [0]]", "unequal"),
        ("[[0, 1.5]]", "whole numbers"), ("[[0, -1]]", "whole numbers"), ("[[0, true]]", "whole numbers"),
        ("[[0, 2, 2, 0]]", "have no slot"), ("[[0, 1, 2]]", "do not divide"), ('{"a": 1}', "no known form"),
        (json.dumps(_GOOD | {"checksum": "0"}), "checksum"), (json.dumps(_GOOD | {"version": 2}), "another version"),
        (json.dumps(_GOOD | {"slots": [[0, 1, 1, 1]]}), "checksum"), (json.dumps(_GOOD | {"ranks": "2"}), "whole"),
        (json.dumps(_GOOD | {"layer_ids": [1, 2]}), "number of its own"), ('{"layer_list": 3}', "lacks a part"),
        ('{"layer_list": [{"layer_id": 0}]}', "lacks a part"), ("[" * 100_000, "no JSON"),
        (json.dumps({"moe_layer_count": 2, "layer_list": [{"layer_id": 0, "device_list": _DEVICES}]}), "contradicts"),
        ("num_slots: 4\ninitial_global_assignments: {0: [0, 1]}\n", "E032"), ("num_slots: 4\n", "places nothing"),
    ],
)  # fmt: skip
def test_what_is_no_placement(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "p").write_text(text)
    with pytest.raises(EplbError) as caught:
        read_placement(tmp_path / "p", ranks=2)
    assert what in str(caught.value)
    assert int(caught.value.exit_code) == 2


def test_ranks_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("[[0, 1]]")
    with pytest.raises(UsageError, match="does not say"):
        read_placement(tmp_path / "p")
    with pytest.raises(ScenarioError):
        read_placement(tmp_path / "nowhere")
    with pytest.raises(ScenarioError):
        read_placement(tmp_path)


def test_loads_of_windows_and_of_tokens(tmp_path: Path) -> None:
    counts = np.arange(12).reshape(2, 2, 3)
    np.savez(tmp_path / "a.npz", counts=counts, layer_ids=[3, 7])
    read = read_counts(tmp_path / "a.npz")
    assert np.array_equal(read.counts, counts)
    assert read.layer_ids == (3, 7)
    ids = np.array([[[0], [1]], [[0], [2]], [[1], [1]], [[2], [0]], [[2], [0]]], np.int32)
    np.savez(tmp_path / "b.npz", topk_ids=ids)
    read = read_counts(tmp_path / "b.npz", tokens_per_window=2)
    assert read.counts.tolist() == [[[2, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 1, 0]]]
    assert read.notes == ("1 tokens after the last full window are left out",)
    with pytest.raises(ScenarioError, match="fewer tokens"):
        read_counts(tmp_path / "b.npz", tokens_per_window=6)


def test_sglangs_counts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": [[0.0, 0.0], [3.0, 4.0], [5, 6]]}))
    read = read_counts(tmp_path / "a.json")
    assert read.counts.tolist() == [[[3, 4], [5, 6]]]
    assert read.layer_ids == (1, 2)
    assert "1 layers without any load" in read.notes[0]


@pytest.mark.parametrize(
    "data",
    [
        [], {}, {"logical_count": None}, {"logical_count": [[0, 0]]}, {"logical_count": [[1, -1]]},
        {"logical_count": [[1.5, 1]]}, {"logical_count": [1, 2]}, {"logical_count": [[1], [1, 2]]},
        {"logical_count": [["a"]]}, {"logical_count": [[[[1]]]]},
    ],
)  # fmt: skip
def test_what_are_no_counts(tmp_path: Path, data: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ScenarioError) as caught:
        read_counts(tmp_path / "a.json")
    assert caught.value.code == "E041"


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    np.savez(tmp_path / "a.npz", counts=np.ones((1, 1, 2), int), layer_ids=np.array([Evil()], object))
    np.savez(tmp_path / "b.npz", counts=np.array([[[Evil()]]], object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ScenarioError):
            read_counts(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "arrays",
    [
        {"layer_ids": [1]}, {"layer_ids": [1, 1]}, {"layer_ids": [1.5, 2.5]}, {"counts": np.full((1, 2, 3), -1)},
        {"counts": np.ones((2, 3), int)},
    ],
)  # fmt: skip
def test_contradictory_loads(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", **({"counts": np.ones((1, 2, 3), int)} | arrays))
    with pytest.raises(ScenarioError):
        read_counts(tmp_path / "a.npz")


def test_damaged_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 2, 3), int), layer_ids=[0, 1])
    whole = (tmp_path / "a.npz").read_bytes()
    for cut in range(1, len(whole), 37):
        (tmp_path / "b.npz").write_bytes(whole[:cut])
        with pytest.raises(ScenarioError):
            read_counts(tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("counts.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(ScenarioError):
        read_counts(tmp_path / "c.npz")


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded loads of real models are not here")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("deepseek_v3_sglang_a.npz", (8, 58, 256)), ("gptoss20b_stream_a.npz", (163, 24, 32)),
        ("sglang_init_expert_location_prefill_in1024.json", (1, 58, 256)),
    ],
)  # fmt: skip
def test_recorded_loads(name: str, shape: tuple[int, ...]) -> None:
    read = read_counts(RECORDED / name)
    assert read.counts.shape == shape
    if shape[1] == 58:
        assert read.layer_ids[0] == 3
