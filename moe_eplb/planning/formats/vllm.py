"""vLLM's maps and load files, as its pull requests 49572 (``initial_expert_map_path``) and 41141 describe them.

A map is JSON, [P] for all layers or [layers][P]. Loads are safetensors: a float32 [layers, E] under each model's name,
metadata ``{"version": "1"}``. Both count only layers with experts.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.formats.files import load_tensors, whole_numbers
from moe_eplb.planning.loads import LoadSet, Origin, bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["loads_of", "write_loads", "write_placement"]

_UNNAMED = "model"
"""What a model is called whose name is not known, since a tensor needs one."""


def loads_of(path: Path, model: str | None) -> LoadSet:
    """Loads of one model of a file.

    Raises:
        UsageError: E196 the file has several models, or none of that name.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("version", "1") != "1":
        raise bad_content(path, "this is a file of another version", f"{metadata['version']!r:.40}")
    if not tensors:
        raise bad_content(path, "the file holds nothing", "no tensors")
    names = ", ".join(sorted(tensors))[:200]
    if model is None and len(tensors) > 1:
        raise UsageError("E196", "the file holds the loads of several models", why=names, hint="use --model")
    name = model if model is not None else next(iter(tensors))
    if name not in tensors:
        raise UsageError("E196", f"there are no loads of {name!r:.60}", why=f"the file has {names}")
    counts = whole_numbers(path, name, tensors[name], 2)[np.newaxis]
    others = f"the loads of {len(tensors) - 1} other models are left out"
    notes = (others,) if len(tensors) > 1 else ()
    origin = Origin(model="" if name == _UNNAMED else name)
    return LoadSet(counts, tuple(range(counts.shape[1])), str(path), notes, False, origin)


def write_loads(loads: LoadSet) -> dict[str, bytes]:
    """The file's content: the windows' sum, under the model's name."""
    from safetensors.numpy import save

    summed = loads.counts.sum(axis=0)[np.argsort(loads.layer_ids)].astype(np.float32)
    return {"": save({loads.origin.model or _UNNAMED: summed}, {"version": "1"})}


def write_placement(placement: PlacementSet) -> bytes:
    """The map of every layer, in the layers' order."""
    return json.dumps(placement.slots[np.argsort(placement.layer_ids)].tolist()).encode()
