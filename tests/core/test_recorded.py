from __future__ import annotations

import io
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core import recorded
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError

SMALL = Path(__file__).resolve().parents[2] / "scenarios" / "data" / "recorded_small.npz"
IDS = np.array([[[0, 1], [2, 3]], [[3, 2], [1, 0]], [[4, 5], [0, 5]]], dtype=np.uint8)


def save(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "f.npz", **arrays)
    return folder / "f.npz"


def test_the_shipped_file_is_what_its_script_writes(tmp_path: Path) -> None:
    script = ModuleType("make_recorded_small")
    script.__file__ = str(SMALL.with_name("make_recorded_small.py"))
    exec(compile(Path(script.__file__).read_text(), script.__file__, "exec"), script.__dict__)
    script.make(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == SMALL.read_bytes()


def test_ids_are_read_with_their_sizes(tmp_path: Path) -> None:
    file = recorded.load(save(tmp_path, topk_ids=IDS, sequence_id=np.array([7, 7, 9]), num_experts=8))
    assert file.topk_ids is not None
    assert file.topk_ids.dtype == np.int32
    assert np.array_equal(file.topk_ids, IDS)
    assert (file.experts, file.layers, file.top_k, file.counts) == (8, 2, 2, None)


def test_counts_are_read_with_their_sizes(tmp_path: Path) -> None:
    file = recorded.load(save(tmp_path, counts=np.ones((3, 2, 5), dtype=np.int32)))
    assert file.counts is not None
    assert file.counts.dtype == np.int64
    assert (file.experts, file.layers, file.top_k, file.topk_ids) == (5, 2, 0, None)


BAD = {
    "nothing": {},
    "both": {"topk_ids": IDS, "counts": np.ones((1, 1, 1), dtype=int)},
    "flat": {"topk_ids": IDS[0]},
    "float": {"topk_ids": IDS.astype(float)},
    "empty": {"topk_ids": IDS[:0]},
    "negative id": {"topk_ids": IDS.astype(int) - 1},
    "twice in a token": {"topk_ids": np.zeros((2, 2, 2), dtype=int)},
    "too few experts": {"topk_ids": IDS, "num_experts": 5},
    "experts no number": {"topk_ids": IDS, "num_experts": np.array([8, 8])},
    "sequences too short": {"topk_ids": IDS, "sequence_id": np.array([0, 1])},
    "negative count": {"counts": np.array([[[1, -1]]])},
    "no count": {"counts": np.array([[[1, 1], [0, 0]]])},
}


@pytest.mark.parametrize("arrays", BAD.values(), ids=list(BAD))
def test_bad_content_is_refused(tmp_path: Path, arrays: dict[str, object]) -> None:
    path = save(tmp_path, **arrays)
    with pytest.raises(ScenarioError) as caught:
        recorded.load(path)
    assert (caught.value.code, caught.value.where) == ("E041", str(path))


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", IDS)
    with pytest.raises(ScenarioError, match=r"single array") as caught:
        recorded.load(tmp_path / "f.npy")
    assert caught.value.code == "E041"


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, topk_ids=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ScenarioError) as caught:
        recorded.load(path)
    assert caught.value.code == "E040"


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut off"])
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "f.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScenarioError) as caught:
        recorded.load(path)
    assert caught.value.code == "E040"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_lead_to_a_scenario_error_or_to_checked_content(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, topk_ids=IDS, num_experts=8)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    try:
        file = recorded.load(path)
    except ScenarioError:
        return
    assert file.topk_ids is not None
    assert file.topk_ids.max() < file.experts


def test_an_archive_with_a_broken_member_is_unreadable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("topk_ids.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8'")
    with pytest.raises(ScenarioError) as caught:
        recorded.load(tmp_path / "f.npz")
    assert caught.value.code == "E040"


def test_by_position_the_sequences_decode_side_by_side(tmp_path: Path) -> None:
    sequence = np.array([5, 5, 2, 5, 2, 8])
    ids = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
    file = recorded.load(save(tmp_path, topk_ids=ids, sequence_id=sequence))
    assert recorded.in_order(file, "position").ravel().tolist() == [2, 0, 5, 4, 1, 3]
    assert recorded.in_order(file, "file").ravel().tolist() == [0, 1, 2, 3, 4, 5]


def test_an_order_by_position_needs_sequences(tmp_path: Path) -> None:
    file = recorded.load(save(tmp_path, topk_ids=IDS))
    with pytest.raises(ScenarioError, match="sequence_id"):
        recorded.in_order(file, "position")


def write_scenario(folder: Path, *, iterations: int = 1, model: str = "{layers: 2, experts: 8, top_k: 2}") -> Path:
    work = "workload: {kind: recorded, tokens_per_rank: 1, path: f.npz}"
    path = folder / "s.yaml"
    path.write_text(f"ranks: 1\niterations: {iterations}\nmodel: {model}\n{work}\n")
    return path


def test_a_file_that_lasts_is_found_beside_its_scenario(tmp_path: Path) -> None:
    save(tmp_path, topk_ids=IDS, num_experts=8)
    assert scenarios.load(write_scenario(tmp_path, iterations=3)).workload.path == str(tmp_path / "f.npz")


def test_running_out_of_tokens_says_how_many_iterations_fit(tmp_path: Path) -> None:
    save(tmp_path, topk_ids=IDS, num_experts=8)
    with pytest.raises(ScenarioError, match="3 iterations fit, 4 are asked for") as caught:
        scenarios.load(write_scenario(tmp_path, iterations=4))
    assert (caught.value.code, caught.value.hint) == ("E042", "iterations: 3")


def test_a_file_must_last_for_the_tokens_of_each_iteration(tmp_path: Path) -> None:
    save(tmp_path, topk_ids=IDS, num_experts=8)
    prompts = ["workload.steps=generate", "workload.prompt_tokens=2"]
    assert scenarios.load(write_scenario(tmp_path, iterations=2), prompts).iterations == 2
    with pytest.raises(
        ScenarioError, match="3 of the 4 tokens that are needed: 2 iterations fit, 3 are asked"
    ) as caught:
        scenarios.load(write_scenario(tmp_path, iterations=3), prompts)
    assert (caught.value.code, caught.value.hint) == ("E042", "iterations: 2")
    with pytest.raises(ScenarioError, match="0 iterations fit, 1 are asked for") as caught:
        scenarios.load(write_scenario(tmp_path), ["workload.steps=mixed", "workload.prompt_tokens=9"])
    assert caught.value.hint == "use fewer tokens_per_rank"


@pytest.mark.parametrize(
    "wrong", ["layers: 3, experts: 8, top_k: 2", "layers: 2, experts: 9, top_k: 2", "layers: 2, experts: 8, top_k: 1"]
)
def test_a_file_that_does_not_fit_the_model_is_refused(tmp_path: Path, wrong: str) -> None:
    save(tmp_path, topk_ids=IDS, num_experts=8)
    with pytest.raises(ScenarioError, match="does not fit the model") as caught:
        scenarios.load(write_scenario(tmp_path, model=f"{{{wrong}}}"))
    assert caught.value.code == "E041"


def test_the_judge_of_a_finished_run_does_not_need_the_file(tmp_path: Path) -> None:
    path = write_scenario(tmp_path)
    assert scenarios.load(path, check_files=False).workload.kind == "recorded"
