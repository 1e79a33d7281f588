"""What is malformed or contradicts itself is refused with a code, numbers and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.planning.formats.loads import read_counts, write_counts
from moe_eplb.planning.loads import LoadSet, Origin

from .drawn import COUNTS, EVERYTHING, per_pass_dump, refused, stat_dump, statistics, vllm_loads

_PLACED = {"format": "moe_eplb placement", "version": 1}
_LOADS = json.loads(write_counts(LoadSet(COUNTS, (3, 5), "x", (), True, EVERYTHING), "json")[0][""])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ([], "no loads of a known form"), ({}, "no loads of a known form"), (_PLACED, "no loads of a known form"),
        ({"logical_count": None}, "numbers in 3"), ({"logical_count": [[0, 0]]}, "no layer has any load"),
        ({"logical_count": [[1, -1]]}, "negative"), ({"logical_count": [[1.5, 1]]}, "whole numbers"),
        ({"logical_count": [1, 2]}, "3 dimensions"), ({"logical_count": [[1], [1, 2]]}, "differ in length"),
        ({"logical_count": [["a"]]}, "must be numbers"), ({"logical_count": [[[[1]]]]}, "3 dimensions"),
        ({"logical_count": [[True, False]]}, "must be numbers"), ({"logical_count": [[1 << 50]]}, "cannot be"),
        ({"logical_count": [[1e300]]}, "cannot be"), ({"logical_count": [[{}]]}, "must be numbers"),
        ({"logical_count": []}, "3 dimensions"), ({"logical_count": [[None, 1]]}, "must be numbers"),
        (_LOADS | {"version": 2}, "another version"), (_LOADS | {"unit": "tokens"}, "unit"),
        (_LOADS | {"checksum": ""}, "checksum"), (_LOADS | {"counts": COUNTS[:1].tolist()}, "checksum"),
        (_LOADS | {"counts": [[1], [1, 2]]}, "differ in length"), (_LOADS | {"counts": 3}, "3 dimensions"),
        (_LOADS | {"counts": [[[-1]]]}, "negative"), (_LOADS | {"layer_ids": [3]}, "number of its own"),
        (_LOADS | {"layer_ids": [3, 3]}, "number of its own"), (_LOADS | {"layer_ids": None}, "whole numbers"),
        (_LOADS | {"iterations": [1]}, "an iteration"), (_LOADS | {"iterations": [1, "2"]}, "iterations"),
        (_LOADS | {"iterations": 3}, "iterations"), (_LOADS | {"ranks": 0}, "at least 1"),
        (_LOADS | {"top_k": 1.5}, "whole number"), (_LOADS | {"phase": 3}, "text"),
        (_LOADS | {"in_order": 1}, "true or"),
    ],
)  # fmt: skip
def test_what_is_no_json_of_loads(tmp_path: Path, data: Any, what: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(data))
    refused(lambda: read_counts(tmp_path / "a.json"), "E041", what)


@pytest.mark.parametrize(
    "text",
    [
        '{"logical_count": [[NaN]]}',
        '{"logical_count": [[1]',
        '{"logical_count": [[1]], "logical_count" : [[2]]}',
        "{\x00",
    ],
)
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ScenarioError) as caught:
        read_counts(tmp_path / "a.json")
    assert caught.value.code == "E041"


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"layer_ids": [1]}, "does not fit"), ({"layer_ids": [1, 1]}, "number of its own"),
        ({"layer_ids": [1.5, 2.5]}, "does not fit"), ({"layer_ids": [-1, 0]}, "counted from 0"),
        ({"counts": np.full((1, 2, 3), -1)}, "negative"), ({"counts": np.ones((2, 3), int)}, "three dimensions"),
        ({"counts": np.ones((1, 2, 3))}, "integers"), ({"counts": np.full((1, 2, 3), np.nan)}, "integers"),
        ({"counts": np.full((1, 2, 3), 1 << 60)}, "cannot be"), ({"topk_ids": [[[0]]]}, "either"),
        ({"counts": np.full((1, 2, 3), (1 << 64) - 1, np.uint64)}, "negative"),
    ],
)  # fmt: skip
def test_contradictory_arrays(tmp_path: Path, arrays: dict[str, Any], what: str) -> None:
    np.savez(tmp_path / "a.npz", **({"counts": np.ones((1, 2, 3), int)} | arrays))
    refused(lambda: read_counts(tmp_path / "a.npz"), "E041", what)


_GOOD = {"0_3": [1, 2, 3], "1_3": [1, 2, 3]}


@pytest.mark.parametrize(
    ("ranks", "what"),
    [
        ([], "files of some ranks are missing"), ([{}], "holds nothing"), ([{"0_3": [1, 2]}], "count all experts"),
        ([{"0_3": [1, -2, 3]}], "negative"), ([{"0_3": [1.0, np.nan, 3]}], "whole numbers"),
        ([{"0_3": [[1, 2, 3]]}], "1 dimensions"), ([{"3": [1, 2, 3]}], "not named"),
        ([{"a_b": [1, 2, 3]}], "not named"),
        ([_GOOD | {"01_3": [1, 2, 3]}], "there twice"), ([{"0_3": [1, 2, 3], "2_3": [1, 2, 3]}], "are missing"),
        ([_GOOD | {"1_4": [1, 2, 3]}], "lack layers"), ([_GOOD, {"0_3": [1, 2, 3]}], "different iterations"),
    ],
)  # fmt: skip
def test_contradictory_statistics(tmp_path: Path, ranks: list[dict[str, Any]], what: str) -> None:
    refused(lambda: read_counts(statistics(tmp_path / "s", ranks)), "E041", what)


def test_statistics_without_some_of_their_files(tmp_path: Path) -> None:
    folder = statistics(tmp_path / "s", [_GOOD, _GOOD, _GOOD])
    (folder / "rank1.safetensors").unlink()
    refused(lambda: read_counts(folder), "E041", "ranks [0, 2]")
    for meta in ("{}", "[]", '{"num_experts": 3}', '{"num_experts": "3", "num_experts_per_token": 2}'):
        (folder / "meta_info.json").write_text(meta)
        refused(lambda: read_counts(folder), "E041", "must be whole numbers")
    (folder / "meta_info.json").write_text('{"num_experts": 3, "num_experts_per_token": 4}')
    refused(lambda: read_counts(folder), "E041", "4 of 3")
    (folder / "meta_info.json").unlink()
    refused(lambda: read_counts(folder), "E040", "no loads of a known form")


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (np.ones(3, np.float32), "2 dimensions"), (np.full((1, 2), 0.5, np.float32), "whole numbers"),
        (np.full((1, 2), np.inf, np.float32), "whole numbers"), (np.full((1, 2), -1, np.float32), "negative"),
        (np.ones((0, 2), np.float32), "empty"),
    ],
)  # fmt: skip
def test_what_are_no_loads_of_vllm(tmp_path: Path, tensor: Any, what: str) -> None:
    refused(lambda: read_counts(vllm_loads(tmp_path / "a", {"m": tensor})), "E041", what)


def test_files_of_vllm_of_another_kind(tmp_path: Path) -> None:
    refused(lambda: read_counts(vllm_loads(tmp_path / "a", {"m": np.ones((1, 2))}, "2")), "E041", "another version")
    save_file({}, tmp_path / "b")
    refused(lambda: read_counts(tmp_path / "b"), "E041", "holds nothing")


MAP = [[0, 1, 0], [1, 0, 1]]
ONES = np.ones((2, 3), int)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "no dump"), ([], "no dump"), (3, "no dump"), ({"logical_count": 3}, "must be a tensor"),
        ({"logical_count": torch.zeros(2, 2, 3)}, "no step has any load"),
        ({"logical_count": torch.ones(2)}, "3 dimensions"), ({"logical_count": -torch.ones(1, 1, 2)}, "negative"),
        ({"logical_count": torch.full((1, 1, 2), torch.nan)}, "whole numbers"),
        ({"logical_count": torch.ones(1, 1, 2, dtype=torch.bfloat16)}, "must be a tensor of numbers"),
        ({"logical_count": torch.ones(1, 1, 2, dtype=torch.bool)}, "must be numbers"),
        ({"records": []}, "no dump of mode per_pass"), ({"records": [{}]}, "no dump of mode per_pass"),
        ({"records": 3, "last_physical_to_logical_map": torch.tensor(MAP)}, "no dump of mode per_pass"),
        ({"records": [3], "last_physical_to_logical_map": torch.tensor(MAP)}, "a record lacks"),
        ({"records": [{"forward_pass_id": 1}], "last_physical_to_logical_map": torch.tensor(MAP)}, "a record lacks"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([0, 1])}, "2 dimensions"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([[0, -1]])}, "negative"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([[0, 2]])}, "without a slot"),
        ({"records": [{}], "last_physical_to_logical_map": torch.tensor([[0, 1 << 40]])}, "without a slot"),
    ],
)  # fmt: skip
def test_what_is_no_dump(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(lambda: read_counts(tmp_path / "a.pt"), "E041", what)


def test_contradictory_dumps(tmp_path: Path) -> None:
    one = tmp_path / "0.pt"
    per_pass_dump(one, 0, MAP, [(1, ONES), (1, ONES)])
    refused(lambda: read_counts(one), "E041", "pass 1 is there twice")
    per_pass_dump(one, 0, MAP, [(1, ONES[:, :2])])
    refused(lambda: read_counts(one), "E041", "does not fit the map")
    per_pass_dump(one, 0, MAP, [(1, -ONES)])
    refused(lambda: read_counts(one), "E041", "negative")
    for rank in (-1, 1 << 40, 1 << 1000, None, [0], torch.zeros(1)):
        per_pass_dump(one, rank, MAP, [(1, ONES)])  # type: ignore[arg-type]
        refused(lambda: read_counts(one), "E041", "records of one rank")
    per_pass_dump(one, 0, MAP, [(1, ONES)])
    for rank, slots, passes, what in (
        (0, MAP, [(1, ONES)], "a rank has several files"),
        (2, MAP, [(1, ONES)], "the files of ranks [1] are missing"),
        (1, MAP[::-1], [(1, ONES)], "placements differ"),
        (1, MAP, [(2, ONES)], "no forward pass is in the files of all ranks"),
    ):
        per_pass_dump(tmp_path / "1.pt", rank, slots, passes)
        refused(lambda: read_counts(tmp_path), "E041", what)
    stat_dump(tmp_path / "1.pt", COUNTS)
    refused(lambda: read_counts(tmp_path), "E041", "no dump of mode per_pass")
    stat_dump(one, COUNTS)
    refused(lambda: read_counts(tmp_path), "E041", "several dumps")


def test_what_are_no_loads(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(lambda: read_counts(tmp_path / "folder"), "E040", "no loads of a known form")
    refused(lambda: read_counts(tmp_path / "nowhere"), "E040", "No such file")
    for content in (b"", b"hello", b"num_slots: 4\n"):
        (tmp_path / "x").write_bytes(content)
        refused(lambda: read_counts(tmp_path / "x"), "E041", "no loads of a known form")
    for content in ("num_slots: 4\n", "[[0, 1]]", '{"layer_list": []}', '{"physical_to_logical_map": []}'):
        (tmp_path / "x").write_text(content)
        refused(lambda: read_counts(tmp_path / "x"), "E041", "it looks like a placement")
    np.save(tmp_path / "a.npy", COUNTS)
    refused(lambda: read_counts(tmp_path / "a.npy"), "E041", "no loads of a known form")


def test_what_a_form_needs_and_the_loads_do_not_say() -> None:
    loads = LoadSet(COUNTS, (0, 1), "x", (), True, Origin())
    with pytest.raises(UsageError, match="cannot hold these loads") as caught:
        write_counts(loads, "tensorrt_llm")
    assert caught.value.code == "E196"
    assert "--top-k" in caught.value.hint
