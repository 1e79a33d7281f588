"""Placements that are malformed or contradict themselves are refused with a code, numbers and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.planning.formats.placements import read_placement, write_placement
from moe_eplb.planning.placements import PlacementSet

from .drawn import refused

_DEVICES = [{"device_expert": [0]}]
_PLACED = json.loads(write_placement(PlacementSet(np.array([[0, 1, 1, 0]], np.int32), 2, 2, (3,), "x"), "json")[0])
_LAYER = {"layer_id": 0, "device_count": 1, "device_list": [{"device_id": 0, "device_expert": [0]}]}


def _map(*layers: Any, **more: Any) -> str:
    return json.dumps({"moe_layer_count": len(layers), "layer_list": list(layers)} | more)


@pytest.mark.parametrize(
    ("text", "code", "what"),
    [
        ("", "E025", "empty"), ("{", "E041", "no JSON"), ("[]", "E041", "list of rows"),
        ("[[]]", "E041", "list of rows"), ("[[0, 1], [0]]", "E041", "unequal"), ("[[0, 1.5]]", "E041", "whole numbers"),
        ("[[0, -1]]", "E041", "whole numbers"), ("[[0, true]]", "E041", "whole numbers"),
        ("[[0, 99999999]]", "E041", "whole numbers"), ("[[0, NaN]]", "E041", "no JSON"),
        ("[[0, 1000000]]", "E041", "no slot"), ("[[0, 2, 2, 0]]", "E041", "have no slot"),
        ("[[0, 1, 2]]", "E041", "do not divide"), ('{"a": 1}', "E041", "no known form"),
        ('{"physical_to_logical_map": [[0, 1]], "physical_to_logical_map": [[1, 0]]}', "E041", "given twice"),
        ('{"physical_to_logical_map": {"0": [0, 1]}}', "E041", "list of rows"),
        (json.dumps(_PLACED | {"checksum": "0"}), "E041", "checksum"),
        (json.dumps(_PLACED | {"version": 2}), "E041", "another version"),
        (json.dumps(_PLACED | {"version": [[]]}), "E041", "another version"),
        (json.dumps(_PLACED | {"slots": [[0, 1, 1, 1]]}), "E041", "checksum"),
        (json.dumps(_PLACED | {"ranks": "2"}), "E041", "whole"), (json.dumps(_PLACED | {"ranks": 0}), "E041", "whole"),
        (json.dumps(_PLACED | {"ranks": None}), "E041", "whole"),
        (json.dumps(_PLACED | {"ranks": 3}), "E041", "do not divide"),
        (json.dumps(_PLACED | {"experts": 3}), "E041", "have no slot"),
        (json.dumps(_PLACED | {"experts": 1}), "E041", "does not exist"),
        (json.dumps(_PLACED | {"experts": 1 << 60}), "E041", "no slot"),
        (json.dumps(_PLACED | {"layer_ids": [1, 2]}), "E041", "number of its own"),
        (json.dumps(_PLACED | {"layer_ids": [-1]}), "E041", "whole numbers"),
        (json.dumps(_PLACED | {"numbered": 1}), "E041", "true or false"),
        (json.dumps(_PLACED | {"source": 1}), "E041", "text"),
        ('{"layer_list": 3}', "E041", "lacks a part"), ('{"layer_list": [{"layer_id": 0}]}', "E041", "lacks a part"),
        ('{"layer_list": []}', "E041", "contradicts"),
        ("[" * 100_000, "E041", "no JSON"), (_map(_LAYER, moe_layer_count=2), "E041", "contradicts"),
        (_map(_LAYER | {"device_count": 2}), "E041", "contradicts"),
        (_map(_LAYER | {"device_count": [2]}), "E041", "contradicts"),
        (_map(_LAYER, _LAYER), "E041", "number of its own"),
        (_map(_LAYER | {"layer_id": 1}, _LAYER), "E041", "contradict the order"),
        (_map(_LAYER | {"layer_id": "0"}), "E041", "whole numbers"),
        (_map(_LAYER | {"device_list": [{"device_id": 1, "device_expert": [0]}]}), "E041", "contradict the order"),
        (_map(_LAYER | {"device_list": [{"device_expert": [1]}]}), "E041", "have no slot"),
        ("num_slots: 4\ninitial_global_assignments: {0: [0, 1]}\n", "E032", "assigns 2 slots"),
        ("num_slots: 4\n", "E041", "places nothing"),
        ("num_slots: 2\ninitial_global_assignments: {}\n", "E041", "nothing"),
        ("num_slots: 3\ninitial_global_assignments: {0: [0, 1, 2]}\n", "E041", "do not divide"),
        ("num_slots: 1\ninitial_global_assignments: {0: [0], 0: [0]}\n", "E022", "twice"),
        ("\x00\x01", "E021", "YAML"),
    ],
)  # fmt: skip
def test_what_is_no_placement(tmp_path: Path, text: str, code: str, what: str) -> None:
    (tmp_path / "p").write_text(text)
    if code not in ("E021", "E022", "E025", "E032"):
        refused(lambda: read_placement(tmp_path / "p", ranks=2), code, what)
        return
    with pytest.raises(ScenarioError) as caught:  # the errors of YAML name a place instead of a reason
        read_placement(tmp_path / "p", ranks=2)
    assert caught.value.code == code
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "code", "what"),
    [
        (np.ones((2, 1), int), "E041", "3 dimensions"), (np.full((1, 1, 2), 2), "E041", "0 and 1"),
        (np.array([[[1, 0]], [[1, 1]]]), "E041", "unequal numbers"),
        (np.array([[[1, 0]], [[1, 0]]]), "E041", "no slot"),
        (np.full((1, 1, 2), np.nan), "E041", "whole numbers"), (np.full((1, 1, 2), -1), "E041", "negative"),
        (np.zeros((0, 1, 2)), "E041", "empty"), (np.array([[["a"]]]), "E041", "numbers"),
    ],
)  # fmt: skip
def test_what_is_no_pattern(tmp_path: Path, pattern: Any, code: str, what: str) -> None:
    np.save(tmp_path / "p.npy", pattern)
    refused(lambda: read_placement(tmp_path / "p.npy"), code, what)


def test_ranks_must_be_known(tmp_path: Path) -> None:
    for text in (
        "[[0, 1]]",
        '{"physical_to_logical_map": [[0, 1]]}',
        "num_slots: 1\ninitial_global_assignments: {0: [0]}",
    ):
        (tmp_path / "p").write_text(text)
        with pytest.raises(UsageError, match="does not say") as caught:
            read_placement(tmp_path / "p")
        assert caught.value.code == "E196"
    for path in (tmp_path / "nowhere", tmp_path):
        refused(lambda path=path: read_placement(path), "E040", "cannot be read")
