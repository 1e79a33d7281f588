"""Every format in one place: whose it is, what it is, what it can hold, and who reads and writes it.

What is lost on the way in or out follows from these tables, and so does the table in the README.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_eplb.planning.formats import ascend, neutral, npz, omni, sglang, sglang_dump, tensorrt_llm, vllm
from moe_eplb.planning.formats.facets import Held, HeldSlots
from moe_eplb.planning.loads import LoadSet
from moe_eplb.planning.placements import PlacementSet

__all__ = ["LOADS", "PLACEMENTS", "LoadForm", "PlacementForm"]

_ALL = frozenset(Held) - {Held.PER_RANK, Held.TOKENS}


@dataclass(frozen=True)
class LoadForm:
    """A form of loads.

    Attributes:
        whose: The project whose format it is.
        what: The file or folder.
        holds: What of a recording it holds; the rest is unknown after reading and gone after writing.
        write: Its files by their name below the output, "" for the output itself; None if it is only read.
    """

    whose: str
    what: str
    holds: frozenset[Held]
    write: Callable[[LoadSet], dict[str, bytes]] | None = None


@dataclass(frozen=True)
class PlacementForm:
    """A form of placements; `holds` and `write` as in `LoadForm`."""

    whose: str
    what: str
    holds: frozenset[HeldSlots]
    write: Callable[[PlacementSet], bytes]


_WINDOWS = frozenset({Held.WINDOWS, Held.LAYER_IDS, Held.EXACT})

LOADS: Mapping[str, LoadForm] = {
    "json": LoadForm("moe_eplb", "JSON with a checksum", _ALL, neutral.write_loads),
    "npz": LoadForm("moe_eplb", "`.npz` with `counts`", _WINDOWS, npz.write_loads),
    "npz_tokens": LoadForm("moe_eplb", "`.npz` with `topk_ids`", _WINDOWS | {Held.ORDER, Held.TOP_K, Held.TOKENS}),
    "run": LoadForm("moe_eplb", "run folder", _WINDOWS | {Held.ORDER}),
    "sglang": LoadForm("SGLang", "JSON with `logical_count`", _WINDOWS, sglang.write_loads),
    "sglang_stat": LoadForm("SGLang", "recorder's `.pt`, mode `stat`", _WINDOWS, sglang_dump.write_stat),
    "sglang_per_pass": LoadForm(
        "SGLang", "recorder's `.pt`, mode `per_pass`, or a folder of all ranks' ones",
        _WINDOWS | {Held.ORDER, Held.ITERATIONS, Held.RANKS, Held.PER_RANK},
    ),
    "tensorrt_llm": LoadForm(
        "TensorRT-LLM", "folder with `meta_info.json` and `rank*.safetensors`, recorded without EPLB",
        _WINDOWS | {Held.ORDER, Held.ITERATIONS, Held.RANKS, Held.TOP_K, Held.PER_RANK}, tensorrt_llm.write_loads,
    ),
    "vllm": LoadForm("vLLM", "load file (safetensors)", frozenset({Held.MODEL}), vllm.write_loads),
}  # fmt: skip
"""Forms of loads by their name."""

_ROWS = frozenset({HeldSlots.SLOT_ORDER, HeldSlots.DUPLICATES})

PLACEMENTS: Mapping[str, PlacementForm] = {
    "json": PlacementForm("moe_eplb", "JSON with a checksum", frozenset(HeldSlots), neutral.write_placement),
    "tensorrt_llm": PlacementForm(
        "TensorRT-LLM", "load balancer YAML", _ROWS | {HeldSlots.LAYER_IDS}, tensorrt_llm.write_placement
    ),
    "sglang": PlacementForm(
        "SGLang", "`--init-expert-location` JSON or `.pt`, and the last map in a recorder's `.pt`",
        _ROWS | {HeldSlots.LAYER_IDS}, sglang.write_placement,
    ),
    "vllm": PlacementForm("vLLM", "`initial_expert_map_path` JSON", _ROWS, vllm.write_placement),
    "ascend": PlacementForm(
        "vllm-ascend, MindIE", "`expert_map_path` JSON",
        frozenset({HeldSlots.LAYER_IDS, HeldSlots.RANKS, HeldSlots.SLOT_ORDER}), ascend.write_placement,
    ),
    "omni": PlacementForm("omni-infer", "pattern `.npy`", frozenset({HeldSlots.RANKS}), omni.write_placement),
}  # fmt: skip
"""Forms of placements by their name."""
