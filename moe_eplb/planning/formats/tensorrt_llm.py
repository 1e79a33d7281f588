"""TensorRT-LLM's load balancer file (YAML) and the folder of its expert statistics.

Statistics: ``meta_info.json`` with ``num_experts`` and ``num_experts_per_token``, and for each rank
``rank{R}.safetensors`` with an int64 [num_experts] under ``{iteration}_{layer}``. With the balancer on, slots are
counted instead of experts, which the files do not say: ``num_experts`` is then the number of slots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.formats.files import MOST_NUMBERS, brief, load_json, load_tensors, whole_numbers
from moe_eplb.planning.formats.slot_rows import checked, given_ranks, slot_table
from moe_eplb.planning.loads import LoadSet, Origin, bad_content, slots_counted
from moe_eplb.planning.placements import PlacementSet

__all__ = ["META", "loads_of", "made_up", "placement_of", "write_loads", "write_placement"]

META = "meta_info.json"
_RANK = re.compile(r"rank([0-9]{1,6})\.safetensors")
_KEY = re.compile(r"([0-9]{1,15})_([0-9]{1,6})")
_Counts = dict[tuple[int, int], NDArray[np.int64]]


def placement_of(path: Path, ranks: int | None, experts: int | None) -> PlacementSet:
    """A placement from a load balancer file."""
    from moe_eplb.core import config

    read = config.load(path)
    if not read.initial_global_assignments:
        raise bad_content(path, "the file places nothing", "it has no initial_global_assignments")
    numbers = sorted(read.initial_global_assignments)
    slots = slot_table(path, [list(read.initial_global_assignments[number]) for number in numbers])
    ranks = read.ep_size if read.ep_size is not None else given_ranks(ranks)
    made = PlacementSet(slots, ranks, experts or int(slots.max()) + 1, tuple(numbers), "TensorRT-LLM")
    return checked(path, made)


def write_placement(placement: PlacementSet) -> bytes:
    """A load balancer file for static routing."""
    from moe_eplb.core.yaml_source import dump

    assignments = dict(zip(placement.layer_ids, placement.slots.tolist(), strict=True))
    slots = placement.slots.shape[1]
    made = {"num_slots": slots, "layer_updates_per_iter": 0, "initial_global_assignments": assignments}
    return dump(made).encode()


def loads_of(path: Path) -> LoadSet:
    """Loads from a folder: a window for each iteration, the ranks' counts summed.

    Raises:
        ScenarioError: E040 a file cannot be read, E041 they contradict each other, E198 slots were counted.
    """
    experts, top_k = _meta(path / META)
    files = {int(match[1]): file for file in path.iterdir() if (match := _RANK.fullmatch(file.name))}
    if sorted(files) != list(range(len(files))) or not files:
        why = f"there are those of ranks {sorted(files)}"[:120] if files else "there are none"
        raise bad_content(path, "the files of some ranks are missing", why, "rank0.safetensors and so on are needed")
    total: _Counts = {}
    for rank in sorted(files):
        found = _of_rank(files[rank], experts)
        if total and set(found) != set(total):
            why = f"{len(found)} and {len(total)} of them, rank 0's first"
            raise bad_content(files[rank], "the ranks recorded different iterations or layers", why)
        total = {key: total[key] + counts if total else counts for key, counts in found.items()}
    iterations, layers = _axes(path, total)
    counts = np.stack([np.stack([total[step, layer] for layer in layers]) for step in iterations])
    note = f"{experts} experts if no balancer (EPLB) was on; otherwise that is the number of slots"
    origin = Origin(iterations=iterations, in_order=True, ranks=len(files), top_k=top_k)
    return LoadSet(counts, layers, str(path), (note,), True, origin)


def write_loads(loads: LoadSet) -> dict[str, bytes]:
    """The folder's files; all counts are rank 0's, other ranks' are zero, so that their number is kept.

    Raises:
        UsageError: E196 it is not known how many experts a token goes to, or the windows' numbers have gaps.
    """
    from safetensors.numpy import save

    origin = loads.origin
    if origin.top_k is None:
        why = "the file says how many experts a token goes to, and the loads do not"
        raise UsageError("E196", "this form cannot hold these loads", why=why, hint="use --top-k")
    steps = origin.iterations
    if steps is None or _gaps(steps):
        steps = tuple(range(loads.windows))
    keys = [(step, layer, w, i) for w, step in enumerate(steps) for i, layer in enumerate(loads.layer_ids)]
    first = {f"{step}_{layer}": loads.counts[w, i] for step, layer, w, i in keys}
    files = {"rank0.safetensors": save(first)}
    for rank in range(1, origin.ranks or 1):
        files[f"rank{rank}.safetensors"] = save({name: np.zeros_like(counts) for name, counts in first.items()})
    meta = {"num_experts": loads.counts.shape[2], "num_experts_per_token": origin.top_k}
    return {**files, META: json.dumps(meta).encode()}


def made_up(loads: LoadSet) -> Iterator[str]:
    """What the folder cannot leave open, or holds otherwise than the loads do."""
    steps = loads.origin.iterations
    if steps is None:
        yield "that the iterations are unknown: they are counted from 0"
    elif _gaps(steps):
        yield "the iteration of each window: they are counted anew, since there can be no gaps"
    if loads.origin.ranks is None:
        yield "that the number of ranks is unknown: there is one"
    if loads.windows > 1 and not loads.origin.in_order:
        yield "that the windows may be in any order"


def _gaps(steps: tuple[int, ...]) -> bool:
    return steps != tuple(range(steps[0], steps[0] + len(steps)))


def _meta(path: Path) -> tuple[int, int]:
    data = load_json(path)
    keys = ("num_experts", "num_experts_per_token")
    found: list[Any] = [data.get(key) if isinstance(data, dict) else None for key in keys]
    if any(type(value) is not int or not 0 < value < 1 << 20 for value in found):
        why = " and ".join(brief(value) for value in found)
        raise bad_content(path, "num_experts and num_experts_per_token must be whole numbers", why)
    experts, top_k = found
    if top_k > experts:
        raise bad_content(path, "a token cannot go to more experts than there are", f"{top_k} of {experts}")
    return experts, top_k


def _of_rank(path: Path, experts: int) -> _Counts:
    tensors, _ = load_tensors(path)
    found: _Counts = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise bad_content(path, "a tensor is not named ITERATION_LAYER", f"{name!r:.60}")
        key = int(match[1]), int(match[2])
        if key in found:
            raise bad_content(path, "an iteration and layer are there twice", f"{name!r:.60}")
        found[key] = _row(path, name, tensor, experts)
    if not found:
        raise bad_content(path, "the file holds nothing", "no tensors")
    return found


def _row(path: Path, name: str, tensor: NDArray[Any], experts: int) -> NDArray[np.int64]:
    counts = whole_numbers(path, name, tensor, 1)
    if len(counts) > experts:
        raise slots_counted(str(path), len(counts), experts)
    if len(counts) < experts:
        raise bad_content(path, f"{name!r} does not count all experts", f"{len(counts)} of {experts}")
    return counts


def _axes(path: Path, counts: _Counts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Iterations and layers, if each of them is there with each of the others."""
    steps, layers = sorted({step for step, _ in counts}), sorted({layer for _, layer in counts})
    size = len(next(iter(counts.values())))
    if len(counts) != len(steps) * len(layers):
        why = f"{len(counts)} of {len(steps)} iterations x {len(layers)} layers"
        raise bad_content(path, "some iterations lack layers", why)
    if steps != list(range(steps[0], steps[0] + len(steps))):
        raise bad_content(path, "iterations are missing", f"{len(steps)} between {steps[0]} and {steps[-1]}")
    if len(counts) * size > MOST_NUMBERS:
        raise bad_content(path, "the recording is too large", f"{MOST_NUMBERS} counts at most")
    return tuple(steps), tuple(layers)
