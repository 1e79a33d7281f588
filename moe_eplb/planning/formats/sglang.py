"""SGLang's ``--init-expert-location``: ``logical_count`` [layers][E] or [steps][layers][E], or
``physical_to_logical_map`` [layers][P]. Every layer of the model has a row there, dense ones too, whose counts are
zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.planning.formats.files import whole_numbers
from moe_eplb.planning.loads import LoadSet, Origin, bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = [
    "all_layers", "dense_rows", "idle_layers", "loads_of", "of_all_layers", "write_loads", "write_placement",
]  # fmt: skip


def loads_of(path: Path, data: dict[str, Any]) -> LoadSet:
    """Loads from the content of a JSON file."""
    try:
        found = np.array(data["logical_count"])
    except ValueError as error:
        raise bad_content(path, "'logical_count' is no table of numbers", "rows differ in length") from error
    return of_all_layers(path, found[np.newaxis] if found.ndim == 2 else found)


def of_all_layers(
    path: Path, found: NDArray[Any], origin: Origin | None = None, notes: tuple[str, ...] = ()
) -> LoadSet:
    """Loads from rows of all layers [W, all layers, E]; those without any load are taken for dense ones."""
    counts = whole_numbers(path, "logical_count", found, 3)
    routed = np.flatnonzero(counts.any(axis=(0, 2)))
    if not len(routed):
        raise bad_content(path, "no layer has any load", f"{counts.shape[1]} layers")
    dense = counts.shape[1] - len(routed)
    notes = (*notes, f"{dense} layers without any load are taken for dense ones") if dense else notes
    return LoadSet(counts[:, routed], tuple(routed.tolist()), str(path), notes, True, origin or Origin())


def write_loads(loads: LoadSet) -> dict[str, bytes]:
    """The file's content, with every window as a step."""
    made = {"logical_count": all_layers(loads)}
    return {"": orjson.dumps(made, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)}


def all_layers(loads: LoadSet) -> NDArray[np.int64]:
    """Counts int64 [W, all layers, E] with rows of zeros for dense layers."""
    made = np.zeros((loads.windows, max(loads.layer_ids) + 1, loads.counts.shape[2]), np.int64)
    made[:, list(loads.layer_ids)] = loads.counts
    return made


def idle_layers(loads: LoadSet) -> int:
    """How many layers will be taken for dense ones, because nothing was routed there."""
    return int((~loads.counts.any(axis=(0, 2))).sum())


def dense_rows(placement: PlacementSet) -> int:
    """How many rows have to be made up."""
    return max(placement.layer_ids) + 1 - len(placement.layer_ids)


def write_placement(placement: PlacementSet) -> bytes:
    """The file's content. It has one key: SGLang refuses any other beside it."""
    there = dict(zip(placement.layer_ids, placement.slots.tolist(), strict=True))
    trivial = [slot % placement.experts for slot in range(placement.slots.shape[1])]
    rows = [there.get(layer, trivial) for layer in range(max(placement.layer_ids) + 1)]
    return json.dumps({"physical_to_logical_map": rows}).encode()
