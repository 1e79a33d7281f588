"""The expert map of vllm-ascend (``expert_map_path``) and MindIE: layers, their devices, and what each of them holds.

vllm-ascend goes by the order of layers and devices and does not look at their numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_eplb.planning.formats.slot_rows import checked, numbers_of_layers, require_no_duplicates, slot_table
from moe_eplb.planning.loads import bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["placement_of", "write_placement"]


def placement_of(path: Path, data: dict[str, Any], experts: int | None) -> PlacementSet:
    """A placement from the content of a file; E041 where numbers and order contradict each other."""
    try:
        layers = data["layer_list"]
        numbers = numbers_of_layers(path, [layer["layer_id"] for layer in layers])
        devices = [layer["device_list"] for layer in layers]
        rows = [[expert for device in each for expert in device["device_expert"]] for each in devices]
        sizes = {len(device["device_expert"]) for each in devices for device in each}
        counts = {len(each) for each in devices}
        declared = all(
            layer.get("device_count", len(layer["device_list"])) == len(layer["device_list"]) for layer in layers
        )
        ordered = all(device.get("device_id", i) == i for each in devices for i, device in enumerate(each))
    except (TypeError, KeyError, AttributeError) as error:
        raise bad_content(path, "a layer lacks a part", f"{type(error).__name__}: {error}"[:80]) from error
    if len(counts) != 1 or len(sizes) != 1 or not declared or data.get("moe_layer_count", len(layers)) != len(layers):
        why = f"{len(layers)} layers, devices {sorted(counts)[:8]}, experts of a device {sorted(sizes)[:8]}"
        raise bad_content(path, "the file contradicts itself", why)
    if not ordered or list(numbers) != sorted(numbers):
        why = "layers and devices must be numbered in their order, which is what is read"
        raise bad_content(path, "the numbers contradict the order", why)
    slots = slot_table(path, rows)
    own = numbers != tuple(range(len(numbers)))
    made = PlacementSet(slots, counts.pop(), experts or int(slots.max()) + 1, numbers, "vllm-ascend", own)
    return checked(path, made)


def write_placement(placement: PlacementSet) -> bytes:
    """The file's content; UsageError E196 with two replicas of an expert on one rank."""
    require_no_duplicates(placement)
    layers = []
    for layer, row in sorted(zip(placement.layer_ids, placement.slots.tolist(), strict=True)):
        size = len(row) // placement.ranks
        held = [row[rank * size : (rank + 1) * size] for rank in range(placement.ranks)]
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(held)]
        layers.append({"layer_id": layer, "device_count": placement.ranks, "device_list": devices})
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}).encode()
