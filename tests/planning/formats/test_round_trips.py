"""Every form reads back what was written to it, but for what its report names; and the reports name no more."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.formats.facets import BY_POSITION, Held, HeldSlots
from moe_eplb.planning.formats.loads import read_counts, write_counts
from moe_eplb.planning.formats.placements import read_placement, write_placement
from moe_eplb.planning.formats.registry import LOADS, PLACEMENTS
from moe_eplb.planning.loads import LoadSet, Origin
from moe_eplb.planning.placements import PlacementSet, require_fit

from .drawn import COUNTS, EVERYTHING, FILES, load_sets, placements, written

WRITTEN = sorted(name for name, form in LOADS.items() if form.write)
_FIELD = {
    "iterations": Held.ITERATIONS,
    "in_order": Held.ORDER,
    "ranks": Held.RANKS,
    "top_k": Held.TOP_K,
    "phase": Held.PHASE,
    "model": Held.MODEL,
}


@FILES
@given(load_sets(), st.sampled_from(WRITTEN))
def test_loads_read_back_but_for_what_is_named(tmp_path: Path, loads: LoadSet, form: str) -> None:
    if form == "tensorrt_llm" and loads.origin.top_k is None:
        with pytest.raises(UsageError, match="cannot hold"):
            write_counts(loads, form)
        return
    files, report = write_counts(loads, form)
    again = read_counts(written(tmp_path, files))
    said = " | ".join(report.lost)
    assert (again.read.form, report.form) == (form, form)
    _require_counts(loads, again, said)
    for field in fields(Origin):
        before, after = getattr(loads.origin, field.name), getattr(again.origin, field.name)
        if before in (None, ""):
            _require_nothing_invented(form, field.name, after, loads.windows)
        elif _FIELD[field.name].value in said:
            assert after in (None, "") or form == "tensorrt_llm", field.name
        elif not (field.name == "in_order" and loads.windows == 1):
            assert after == before, field.name
    if loads.numbered and again.numbered is False:
        assert Held.LAYER_IDS.value in said
    if not loads.numbered and again.numbered:
        assert BY_POSITION in said


def _require_counts(loads: LoadSet, again: LoadSet, said: str) -> None:
    counts = loads.counts
    if Held.WINDOWS.value in said:
        counts = counts.sum(axis=0, keepdims=True)
    if "layers without any load" in said:
        counts = counts[:, loads.counts.any(axis=(0, 2))]
    if "windows without any load" in said:
        counts = counts[counts.any(axis=(1, 2))]
    if Held.EXACT.value in said:
        assert np.allclose(again.counts, counts, rtol=1e-6)
        assert not np.array_equal(again.counts, counts)
    else:
        assert np.array_equal(again.counts, counts)
    if loads.numbered and Held.LAYER_IDS.value not in said and "layers without any load" not in said:
        assert again.layer_ids == loads.layer_ids


def _require_nothing_invented(form: str, name: str, found: Any, windows: int) -> None:
    """TensorRT-LLM's folder cannot leave out how many ranks and which iterations there were."""
    known = {"ranks": 1, "iterations": tuple(range(windows)), "in_order": True} if form == "tensorrt_llm" else {}
    assert found in (None, "", known.get(name))


_NAMED: dict[str, list[Held]] = {
    "json": [],
    "npz": [Held.ORDER, Held.ITERATIONS, Held.RANKS, Held.TOP_K, Held.PHASE, Held.MODEL],
    "sglang": [Held.ORDER, Held.ITERATIONS, Held.RANKS, Held.TOP_K, Held.PHASE, Held.MODEL],
    "sglang_stat": [Held.ORDER, Held.ITERATIONS, Held.RANKS, Held.TOP_K, Held.PHASE, Held.MODEL],
    "tensorrt_llm": [Held.PHASE, Held.MODEL],
    "vllm": [
        Held.WINDOWS, Held.ORDER, Held.ITERATIONS, Held.LAYER_IDS, Held.RANKS, Held.TOP_K, Held.PHASE, Held.EXACT,
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", WRITTEN)
def test_each_lossy_direction_of_loads_is_named(form: str) -> None:
    counts = COUNTS.copy()
    counts[0, 0, 0] = (1 << 24) + 1
    loads = LoadSet(counts, (3, 5), "x", (), True, EVERYTHING)
    lost = write_counts(loads, form)[1].lost
    assert set(lost) == {one.value for one in _NAMED[form]}
    less = LoadSet(COUNTS[:1], (0, 1), "x", (), False)
    assert Held.WINDOWS.value not in write_counts(less, "vllm")[1].lost


@pytest.mark.parametrize(
    ("form", "unknown", "left_out"),
    [
        ("json", [], []),
        ("npz", _NAMED["npz"], []),
        ("sglang", _NAMED["sglang"], []),
        ("sglang_stat", _NAMED["sglang_stat"], []),
        ("tensorrt_llm", [Held.PHASE, Held.MODEL], [Held.PER_RANK]),
        ("vllm", _NAMED["vllm"], []),
    ],
)
def test_what_a_form_does_not_tell_is_named_when_it_is_read(
    tmp_path: Path, form: str, unknown: list[Held], left_out: list[Held]
) -> None:
    files, _ = write_counts(LoadSet(COUNTS, (3, 5), "x", (), True, EVERYTHING), form)
    read = read_counts(written(tmp_path, files)).read
    assert set(read.lost) == {one.value for one in unknown}
    assert set(read.left_out) == {one.value for one in left_out}


def test_special_cases_of_loads_are_named() -> None:
    idle = LoadSet(np.array([[[1, 2], [0, 0]], [[0, 0], [0, 0]]]), (0, 1), "x")
    assert "1 layers without any load: they will be taken for dense ones" in write_counts(idle, "sglang")[1].lost
    lost = write_counts(idle, "sglang_stat")[1].lost
    assert "1 windows without any load: they will be taken for steps that were never filled" in lost
    apart = LoadSet(COUNTS, (0, 1), "x", (), True, Origin(iterations=(3, 9), top_k=1))
    assert any("counted anew" in one for one in write_counts(apart, "tensorrt_llm")[1].lost)
    nameless = LoadSet(COUNTS, (0, 1), "x", (), False, Origin(top_k=1))
    for made_up in ("counted from 0", "there is one", "in any order"):
        assert any(made_up in one for one in write_counts(nameless, "tensorrt_llm")[1].lost)
    for form in ("sglang", "sglang_stat", "tensorrt_llm"):
        assert BY_POSITION in write_counts(nameless, form)[1].lost
    for form in ("run", "npz_tokens", "sglang_per_pass", "yaml"):
        with pytest.raises(UsageError, match="cannot be written"):
            write_counts(idle, form)


@FILES
@given(st.data(), st.sampled_from(sorted(PLACEMENTS)))
def test_placements_read_back_but_for_what_is_named(tmp_path: Path, data: st.DataObject, form: str) -> None:
    placement = data.draw(placements(duplicates=form not in ("ascend", "omni")))
    content, report = write_placement(placement, form)
    path = tmp_path / "p"
    path.write_bytes(content)
    again = read_placement(path, ranks=placement.ranks)
    said = " | ".join(report.lost)
    assert (again.ranks, again.experts, again.read.form) == (placement.ranks, placement.experts, form)
    loads = LoadSet(np.ones((1, len(placement.layer_ids), placement.experts), np.int64), placement.layer_ids, "x")
    fitted = require_fit(loads, again).slots
    if HeldSlots.SLOT_ORDER.value in said:
        shape = (len(fitted), placement.ranks, -1)
        assert np.array_equal(fitted, np.sort(placement.slots.reshape(shape), axis=2).reshape(fitted.shape))
    else:
        assert np.array_equal(fitted, placement.slots)
    if HeldSlots.LAYER_IDS.value not in said and form != "sglang":
        assert again.layer_ids == placement.layer_ids
    if form == "json":
        assert (again.source, again.numbered, report.lost) == (placement.source, placement.numbered, ())


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("json", []),
        ("tensorrt_llm", [HeldSlots.RANKS, HeldSlots.SOURCE]),
        ("sglang", [HeldSlots.RANKS, HeldSlots.SOURCE]),
        ("vllm", [HeldSlots.LAYER_IDS, HeldSlots.RANKS, HeldSlots.SOURCE]),
        ("ascend", [HeldSlots.SOURCE]),
        ("omni", [HeldSlots.LAYER_IDS, HeldSlots.SLOT_ORDER, HeldSlots.SOURCE]),
    ],
)
def test_each_lossy_direction_of_placements_is_named(form: str, named: list[HeldSlots]) -> None:
    placement = PlacementSet(np.array([[1, 0, 1, 0]], np.int32), 2, 2, (3,), "a plan")
    lost = [one for one in write_placement(placement, form)[1].lost if "are made up" not in one]
    assert set(lost) == {one.value for one in named}
    twice = PlacementSet(np.array([[0, 0, 1, 1]], np.int32), 2, 2, (0,))
    if form in ("ascend", "omni"):
        with pytest.raises(UsageError, match="two replicas") as caught:
            write_placement(twice, form)
        assert caught.value.code == "E196"
        assert "layer 0, rank 0" in caught.value.why
    else:
        write_placement(twice, form)


def test_special_cases_of_placements_are_named() -> None:
    placement = PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,))
    made_up = "3 rows of layers without experts are made up, since every layer has a row there"
    assert made_up in write_placement(placement, "sglang")[1].lost
    nameless = PlacementSet(np.array([[0, 1]], np.int32), 2, 2, (0,), "", False)
    for form in ("tensorrt_llm", "sglang"):
        assert BY_POSITION in write_placement(nameless, form)[1].lost
    for form in ("vllm", "ascend", "omni"):
        assert BY_POSITION not in write_placement(nameless, form)[1].lost
    with pytest.raises(UsageError, match="no form"):
        write_placement(placement, "yaml")


def test_what_a_placements_form_does_not_tell_is_named_when_it_is_read(tmp_path: Path) -> None:
    placement = PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,), "a plan")
    (tmp_path / "p").write_bytes(write_placement(placement, "omni")[0])
    told = {HeldSlots.LAYER_IDS, HeldSlots.SLOT_ORDER, HeldSlots.SOURCE}
    assert set(read_placement(tmp_path / "p").read.lost) == {one.value for one in told}
