"""Placements as TensorRT-LLM, SGLang, vLLM and vllm-ascend or MindIE keep them, and as we do.

Sources: TensorRT-LLM's balancer configuration; SGLang's ``--init-expert-location``; vLLM pull request 49572
(``initial_expert_map_path``); vllm-ascend's ``expert_map_path``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.core.input_file import read_input
from moe_eplb.core.yaml_source import dump
from moe_eplb.planning.loads import LossReport, PlacementSet

__all__ = ["FORMS", "Form", "read_placement", "write_placement"]

_MOST_BYTES = 256 << 20
_OURS = "moe_eplb placement"


class Form(NamedTuple):
    """A form: whose it is, how its text is made, and what it never holds."""

    whose: str
    make: Callable[[PlacementSet], str]
    never: str


def write_placement(placement: PlacementSet, form: str) -> tuple[str, LossReport]:
    """The text of a placement in one of `FORMS`, and what of it that form does not hold.

    Raises:
        UsageError: E196 there is no such form, or it cannot hold this placement at all.
    """
    if form not in FORMS:
        raise UsageError("E196", f"there is no form {form!r}", hint=f"one of {', '.join(FORMS)}")
    lost = [FORMS[form].never] if FORMS[form].never else []
    dense = max(placement.layer_ids) + 1 - len(placement.layer_ids)
    if form == "sglang" and dense:
        lost.append(f"{dense} rows of layers without experts are made up, since every layer has a row there")
    if form == "vllm" and placement.layer_ids != tuple(range(len(placement.layer_ids))):
        lost.append("the layers' own numbers: rows go by the order of the layers with experts")
    return FORMS[form].make(placement), LossReport(tuple(lost))


def read_placement(path: Path, *, ranks: int | None = None, experts: int | None = None) -> PlacementSet:
    """A placement of any of `FORMS`; what it is, is told by its content.

    Args:
        ranks: R, for forms that do not state it.
        experts: E, for forms that do not state it; by default the highest id + 1.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it is no placement or contradicts itself.
        UsageError: E196 `ranks` is needed and not given.
    """
    try:
        text = read_input(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ScenarioError("E040", "a placement cannot be read", why=str(error), where=str(path)) from error
    if text.lstrip()[:1] not in (b"{", b"["):
        return _of_tensorrt_llm(path, ranks, experts)
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _bad(path, "this is no JSON", str(error)) from error
    if isinstance(data, dict) and data.get("format") == _OURS:
        return _of_ours(path, data)
    if isinstance(data, dict) and "layer_list" in data:
        return _of_ascend(path, data, experts)
    if isinstance(data, dict) and "physical_to_logical_map" in data:
        return _of_rows(path, data["physical_to_logical_map"], ranks, experts)
    if isinstance(data, list):
        return _of_rows(path, data if data and isinstance(data[0], list) else [data], ranks, experts)
    raise _bad(path, "this is a placement of no known form", f"keys {', '.join(sorted(data))[:80]}")


# -- writers ---------------------------------------------------------------------------------------------------------


def _ours(placement: PlacementSet) -> str:
    rows = placement.slots.tolist()
    data = {
        "format": _OURS, "version": 1, "ranks": placement.ranks, "experts": placement.experts,
        "layer_ids": list(placement.layer_ids), "source": placement.source, "checksum": _checksum(rows), "slots": rows,
    }  # fmt: skip
    return json.dumps(data)


def _tensorrt_llm(placement: PlacementSet) -> str:
    assignments = dict(zip(placement.layer_ids, placement.slots.tolist(), strict=True))
    return dump(
        {"num_slots": placement.slots.shape[1], "layer_updates_per_iter": 0, "initial_global_assignments": assignments}
    )


def _sglang(placement: PlacementSet) -> str:
    there = dict(zip(placement.layer_ids, placement.slots.tolist(), strict=True))
    trivial = [slot % placement.experts for slot in range(placement.slots.shape[1])]
    rows = [there.get(layer, trivial) for layer in range(max(placement.layer_ids) + 1)]
    return json.dumps({"physical_to_logical_map": rows})


def _vllm(placement: PlacementSet) -> str:
    return json.dumps(placement.slots.tolist())


def _ascend(placement: PlacementSet) -> str:
    layers = []
    for layer, row in zip(
        placement.layer_ids, placement.slots.reshape(len(placement.slots), placement.ranks, -1), strict=True
    ):
        for rank, held in enumerate(row.tolist()):
            if len(set(held)) != len(held):
                why = f"layer {layer}, rank {rank}"
                raise UsageError("E196", "this form cannot hold two replicas of an expert on one rank", why=why)
        devices = [{"device_id": rank, "device_expert": held} for rank, held in enumerate(row.tolist())]
        layers.append({"layer_id": layer, "device_count": placement.ranks, "device_list": devices})
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers})


FORMS: Mapping[str, Form] = {
    "json": Form("moe_eplb", _ours, ""),
    "tensorrt_llm": Form("TensorRT-LLM (YAML)", _tensorrt_llm, "the number of ranks and of experts"),
    "sglang": Form("SGLang --init-expert-location", _sglang, "the number of ranks and of experts"),
    "vllm": Form("vLLM initial_expert_map_path", _vllm, "the number of ranks and of experts"),
    "ascend": Form("vllm-ascend and MindIE expert_map_path", _ascend, "the number of experts"),
}
"""Every form by its name."""


# -- readers ---------------------------------------------------------------------------------------------------------


def _of_ours(path: Path, data: dict[str, Any]) -> PlacementSet:
    if data.get("version") != 1:
        raise _bad(path, "this is a placement of another version", f"{data.get('version')!r:.40}")
    rows, ranks, experts = data.get("slots"), data.get("ranks"), data.get("experts")
    if type(ranks) is not int or type(experts) is not int:
        raise _bad(path, "ranks and experts must be whole numbers", f"{ranks!r:.20} and {experts!r:.20}")
    slots = _table(path, rows)
    if data.get("checksum") != _checksum(slots.tolist()):
        raise _bad(path, "the checksum is not that of the slots", "the file was changed or cut")
    ids = data.get("layer_ids")
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < 1 << 20 for i in ids):
        raise _bad(path, "layer_ids must be a list of layers' numbers", f"{ids!r:.60}")
    return _checked(path, slots, ranks, experts, tuple(ids), str(data.get("source", ""))[:200])


def _of_ascend(path: Path, data: dict[str, Any], experts: int | None) -> PlacementSet:
    try:
        layers = data["layer_list"]
        numbers = [layer["layer_id"] for layer in layers]
        rows = [[expert for device in layer["device_list"] for expert in device["device_expert"]] for layer in layers]
        sizes = {len(device["device_expert"]) for layer in layers for device in layer["device_list"]}
        counts = {len(layer["device_list"]) for layer in layers}
        declared = {layer.get("device_count", len(layer["device_list"])) for layer in layers}
    except (TypeError, KeyError) as error:
        raise _bad(path, "a layer lacks a part", f"{type(error).__name__}: {error}"[:80]) from error
    if (
        len(counts) != 1
        or len(sizes) != 1
        or declared != counts
        or data.get("moe_layer_count", len(layers)) != len(layers)
    ):
        why = f"devices {sorted(counts)}, declared {sorted(map(str, declared))}, experts of a device {sorted(sizes)}"
        raise _bad(path, "the file contradicts itself", why[:200])
    slots = _table(path, rows)
    return _checked(path, slots, counts.pop(), experts or int(slots.max()) + 1, _ids(path, numbers), "vllm-ascend")


def _of_rows(path: Path, rows: Any, ranks: int | None, experts: int | None) -> PlacementSet:
    slots = _table(path, rows)
    return _checked(path, slots, _given(ranks), experts or int(slots.max()) + 1, tuple(range(len(slots))), "")


def _of_tensorrt_llm(path: Path, ranks: int | None, experts: int | None) -> PlacementSet:
    from moe_eplb.core import config

    read = config.load(path)
    if read.initial_global_assignments is None:
        raise _bad(path, "the file places nothing", "it has no initial_global_assignments")
    numbers = sorted(read.initial_global_assignments)
    slots = _table(path, [list(read.initial_global_assignments[number]) for number in numbers])
    ranks = ranks if ranks is not None else read.ep_size
    return _checked(path, slots, _given(ranks), experts or int(slots.max()) + 1, tuple(numbers), "TensorRT-LLM")


def _given(ranks: int | None) -> int:
    if ranks is None:
        raise UsageError("E196", "this form does not say how many ranks there are", hint="use --ranks")
    return ranks


def _table(path: Path, rows: Any) -> NDArray[np.int32]:
    """Rows of equal length of whole numbers."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise _bad(path, "a placement is a list of rows of experts", f"{type(rows).__name__}")
    if len({len(row) for row in rows}) != 1:
        raise _bad(path, "layers have unequal numbers of slots", f"{sorted({len(row) for row in rows})}"[:80])
    if any(type(value) is not int or not 0 <= value < 1 << 20 for row in rows for value in row):
        raise _bad(path, "slots hold whole numbers of experts", "at least one is something else")
    return np.array(rows, np.int32)


def _ids(path: Path, numbers: Sequence[Any]) -> tuple[int, ...]:
    if any(type(number) is not int or number < 0 for number in numbers):
        raise _bad(path, "layers have whole numbers", f"{list(numbers)!r:.60}")
    return tuple(numbers)


def _checked(
    path: Path, slots: NDArray[np.int32], ranks: int, experts: int, layer_ids: tuple[int, ...], source: str
) -> PlacementSet:
    if ranks < 1 or slots.shape[1] % ranks:
        raise _bad(path, f"{slots.shape[1]} slots do not divide by {ranks} ranks", "")
    if len(layer_ids) != len(slots) or len(set(layer_ids)) != len(layer_ids):
        raise _bad(path, "every layer needs a number of its own", f"{len(set(layer_ids))} for {len(slots)} layers")
    for layer, row in zip(layer_ids, slots, strict=True):
        missing = sorted(set(range(experts)) - set(row.tolist()))
        if missing or int(row.max()) >= experts:
            what = f"experts {missing[:8]} have no slot" if missing else f"expert {int(row.max())} does not exist"
            raise _bad(path, f"layer {layer}: {what}", f"of {experts} experts")
    return PlacementSet(slots, ranks, experts, layer_ids, source)


def _checksum(rows: list[list[int]]) -> str:
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def _bad(path: Path, what: str, why: str) -> ScenarioError:
    return ScenarioError("E041", what, why=why, where=str(path))
