"""Placements from any form, told by its content, and into any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.formats import ascend, neutral, omni, sglang, sglang_dump, tensorrt_llm
from moe_eplb.planning.formats.facets import BY_POSITION, HeldSlots, of_placement
from moe_eplb.planning.formats.files import head_of, load_json
from moe_eplb.planning.formats.registry import PLACEMENTS
from moe_eplb.planning.formats.slot_rows import checked, given_ranks, slot_table
from moe_eplb.planning.formats.torch_file import load_torch
from moe_eplb.planning.loads import LossReport, bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["read_placement", "write_placement"]


def write_placement(placement: PlacementSet, form: str) -> tuple[bytes, LossReport]:
    """The content of a placement's file in one of `PLACEMENTS`, and what of it that form does not hold.

    Raises:
        UsageError: E196 there is no such form, or it cannot hold this placement at all.
    """
    if form not in PLACEMENTS:
        raise UsageError("E196", f"there is no form {form!r}", hint=f"one of {', '.join(PLACEMENTS)}")
    holds = PLACEMENTS[form].holds
    lost = [one.value for one in of_placement(placement) if one not in holds]
    return PLACEMENTS[form].write(placement), LossReport((*lost, *_also_lost(placement, form)), form)


def read_placement(path: Path, *, ranks: int | None = None, experts: int | None = None) -> PlacementSet:
    """A placement of any of `PLACEMENTS`; what it is, is told by its content.

    Args:
        ranks: R, for forms that do not state it.
        experts: E, for forms that do not state it; by default the highest id + 1.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it is no placement or contradicts itself, E197 it could run a
            program.
        UsageError: E196 `ranks` is needed and not given, E195 the file is for another number of them.
    """
    form, placement = _read(path, ranks, experts)
    if ranks is not None and placement.ranks != ranks:
        why, hint = f"{placement.ranks} in the file, not {ranks}", f"use --ranks {placement.ranks}"
        raise UsageError("E195", "the placement is for another number of ranks", why=why, hint=hint)
    lacks = [one for one in HeldSlots if one not in PLACEMENTS[form].holds]
    lost = tuple(one.value for one in lacks if one is not HeldSlots.DUPLICATES)  # there are none, which is known
    return replace(placement, read=LossReport(lost, form))


def _read(path: Path, ranks: int | None, experts: int | None) -> tuple[str, PlacementSet]:
    head = head_of(path)
    if head[:6] == b"\x93NUMPY":
        return "omni", omni.placement_of(path)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "sglang", _of_rows(path, sglang_dump.placement_rows(path, load_torch(path)), ranks, experts, True)
    if head.lstrip()[:1] not in (b"{", b"["):
        return "tensorrt_llm", tensorrt_llm.placement_of(path, ranks, experts)
    data = load_json(path)
    if isinstance(data, dict) and data.get("format") == neutral.PLACEMENT:
        return "json", neutral.placement_of(path, data)
    if isinstance(data, dict) and "layer_list" in data:
        return "ascend", ascend.placement_of(path, data, experts)
    if isinstance(data, dict) and "physical_to_logical_map" in data:
        return "sglang", _of_rows(path, data["physical_to_logical_map"], ranks, experts, True)
    if isinstance(data, list):
        rows = data if data and isinstance(data[0], list) else [data]
        return "vllm", _of_rows(path, rows, ranks, experts, False)
    raise bad_content(path, "this is a placement of no known form", f"keys {', '.join(sorted(data))[:80]}")


def _of_rows(path: Path, rows: Any, ranks: int | None, experts: int | None, numbered: bool) -> PlacementSet:
    slots = slot_table(path, rows)
    ids = tuple(range(len(slots)))
    made = PlacementSet(slots, given_ranks(ranks), experts or int(slots.max()) + 1, ids, "", numbered)
    return checked(path, made)


def _also_lost(placement: PlacementSet, form: str) -> Iterator[str]:
    """What a form holds in general, but not of this placement."""
    if not placement.numbered and form in ("tensorrt_llm", "sglang"):
        yield BY_POSITION
    if form == "sglang" and (dense := sglang.dense_rows(placement)):
        yield f"{dense} rows of layers without experts are made up, since every layer has a row there"
