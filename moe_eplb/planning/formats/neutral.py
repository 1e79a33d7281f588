"""Our own JSON for loads and for placements: it holds all that is known, and a checksum.

Loads: ``{"format": "moe_eplb loads", "version": 1, "unit": ..., "layer_ids": [L], "numbered": ..., "iterations": [W] or
null, "in_order": ..., "ranks": ..., "top_k": ..., "phase": ..., "model": ..., "source": ..., "checksum": ...,
"counts": [W][L][E]}``. Placements hold ``ranks``, ``experts`` and ``slots`` [L][P] instead.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.planning.formats.files import brief, whole_numbers
from moe_eplb.planning.formats.slot_rows import checked, numbers_of_layers, slot_table
from moe_eplb.planning.loads import LoadSet, Origin, bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["LOADS", "PLACEMENT", "loads_of", "placement_of", "write_loads", "write_placement"]

LOADS = "moe_eplb loads"
PLACEMENT = "moe_eplb placement"
_UNIT = "routed (token, k) pairs"


def write_loads(loads: LoadSet) -> dict[str, bytes]:
    """The file's content."""
    origin = loads.origin
    data = {
        "format": LOADS, "version": 1, "unit": _UNIT, "layer_ids": list(loads.layer_ids), "numbered": loads.numbered,
        "iterations": None if origin.iterations is None else list(origin.iterations), "in_order": origin.in_order,
        "ranks": origin.ranks, "top_k": origin.top_k, "phase": origin.phase, "model": origin.model,
        "source": _text(loads.source), "checksum": _of_counts(loads.counts),
        "counts": np.ascontiguousarray(loads.counts),
    }  # fmt: skip
    return {"": orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)}


def loads_of(path: Path, data: dict[str, Any]) -> LoadSet:
    """Loads from the content of a file."""
    _require_version(path, data)
    if data.get("unit") != _UNIT:
        raise bad_content(path, f"the unit must be {_UNIT!r}", brief(data.get("unit")))
    try:
        found = np.array(data.get("counts"))
    except ValueError as error:
        raise bad_content(path, "'counts' is no table of numbers", "rows differ in length") from error
    counts = whole_numbers(path, "counts", found, 3)
    if data.get("checksum") != _of_counts(counts):
        raise bad_content(path, "the checksum is not that of the counts", "the file was changed or cut")
    origin = Origin(
        _iterations(path, data.get("iterations")), _one(path, data, "in_order", bool), _one(path, data, "ranks", int),
        _one(path, data, "top_k", int), _one(path, data, "phase", str) or "", _one(path, data, "model", str) or "",
    )  # fmt: skip
    numbered = _one(path, data, "numbered", bool)
    ids = numbers_of_layers(path, data.get("layer_ids"))
    return LoadSet(counts, ids, _one(path, data, "source", str) or str(path), (), numbered is not False, origin)


def write_placement(placement: PlacementSet) -> bytes:
    """The file's content."""
    rows = placement.slots.tolist()
    data = {
        "format": PLACEMENT, "version": 1, "ranks": placement.ranks, "experts": placement.experts,
        "layer_ids": list(placement.layer_ids), "numbered": placement.numbered, "source": _text(placement.source),
        "checksum": _of_rows(rows), "slots": rows,
    }  # fmt: skip
    return json.dumps(data).encode()


def placement_of(path: Path, data: dict[str, Any]) -> PlacementSet:
    """A placement from the content of a file."""
    _require_version(path, data)
    ranks, experts = _one(path, data, "ranks", int), _one(path, data, "experts", int)
    if ranks is None or experts is None:
        raise bad_content(path, "ranks and experts must be whole numbers", "at least one is missing")
    slots = slot_table(path, data.get("slots"))
    if data.get("checksum") != _of_rows(slots.tolist()):
        raise bad_content(path, "the checksum is not that of the slots", "the file was changed or cut")
    ids = numbers_of_layers(path, data.get("layer_ids"))
    numbered = _one(path, data, "numbered", bool)
    source = _one(path, data, "source", str) or ""
    return checked(path, PlacementSet(slots, ranks, experts, ids, source, numbered is not False))


def _text(source: str) -> str:
    """A source, which may be a path, as text that JSON can hold."""
    return source.encode("utf-8", "backslashreplace").decode()


def _require_version(path: Path, data: dict[str, Any]) -> None:
    if data.get("version") != 1:
        raise bad_content(path, "this is a file of another version", brief(data.get("version")))


def _one(path: Path, data: dict[str, Any], key: str, kind: type) -> Any:
    """A value of a kind, or None where there is none."""
    value: Any = data.get(key)
    if value is None:
        return None
    if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
        wanted = {int: "a whole number of at least 1", bool: "true or false", str: "text"}[kind]
        raise bad_content(path, f"{key!r} must be {wanted}", brief(value))
    return value


def _iterations(path: Path, found: Any) -> tuple[int, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list) or any(type(one) is not int or not 0 <= one < 1 << 62 for one in found):
        raise bad_content(path, "'iterations' must be a list of whole numbers", brief(found))
    return tuple(found)


def _of_counts(counts: NDArray[np.int64]) -> str:
    digest = hashlib.blake2b(str(counts.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(counts, "<i8").tobytes())
    return digest.hexdigest()


def _of_rows(rows: list[list[int]]) -> str:
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
