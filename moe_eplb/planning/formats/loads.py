"""Loads from any form, told by its content, and into the forms that can be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.planning.formats import neutral, npz, sglang, sglang_dump, tensorrt_llm, vllm
from moe_eplb.planning.formats.facets import BY_POSITION, Held, after_reading, of_loads
from moe_eplb.planning.formats.files import head_of, load_json, unreadable
from moe_eplb.planning.formats.registry import LOADS
from moe_eplb.planning.formats.torch_file import is_torch_file, load_torch
from moe_eplb.planning.loads import LoadSet, LossReport, bad_content, slots_counted

__all__ = ["Reading", "read_counts", "write_counts"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a user says of a file that it does not say itself.

    Attributes:
        tokens_per_window: Of a file of tokens.
        experts: E; loads of another number are refused.
        model: Which of a file's models; None for the only one.
        layer_ids: The model's own numbers of the file's layers, where it has none.
        merge: Windows to sum into one, 0 for all of them.
    """

    tokens_per_window: int = 4096
    experts: int | None = None
    model: str | None = None
    layer_ids: tuple[int, ...] | None = None
    merge: int = 1


def read_counts(path: Path, asked: Reading | None = None) -> LoadSet:
    """Loads of any of `LOADS`; what it is, is told by its content.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it is none of them or contradicts itself, E197 it could run a
            program, E198 it counts slots instead of experts.
        UsageError: E195 it is of other experts or layers or has too few windows, E196 it has several models.
    """
    asked = asked or Reading()
    try:
        form, read = _folder(path) if path.is_dir() else _file(path, asked)
        loads = read()
    except OSError as error:
        raise unreadable(path, error) from error
    experts = loads.counts.shape[2]
    if asked.experts is not None and experts != asked.experts:
        if form == "tensorrt_llm" and experts > asked.experts:
            raise slots_counted(str(path), experts, asked.experts)
        raise UsageError("E195", f"the loads are of {experts} experts, not {asked.experts}", hint="see --experts")
    if asked.layer_ids is not None:
        loads = loads.numbered_as(asked.layer_ids)
    if asked.merge != 1:
        loads = loads.merged(asked.merge)
    told = {Held.LAYER_IDS} if asked.layer_ids is not None else set()
    return replace(loads, read=after_reading(form, LOADS[form].holds | told))


def write_counts(loads: LoadSet, form: str) -> tuple[dict[str, bytes], LossReport]:
    """The files of loads in one of `LOADS`, by their name below the output, and what is lost.

    Raises:
        UsageError: E196 there is no such form, it is only read, or it lacks something that the form needs.
    """
    if form not in LOADS or LOADS[form].write is None:
        written = ", ".join(name for name, one in LOADS.items() if one.write)
        raise UsageError("E196", f"loads cannot be written as {form!r}", hint=f"one of {written}")
    write, holds = LOADS[form].write, LOADS[form].holds
    assert write is not None
    lost = [one.value for one in of_loads(loads) if one not in holds]
    return write(loads), LossReport((*lost, *_also_lost(loads, form)), form)


def _also_lost(loads: LoadSet, form: str) -> Iterator[str]:
    """What a form holds in general, but not of these loads."""
    if not loads.numbered and Held.LAYER_IDS in LOADS[form].holds and form not in ("json", "npz"):
        yield BY_POSITION
    if form in ("sglang", "sglang_stat") and (idle := sglang.idle_layers(loads)):
        yield f"{idle} layers without any load: they will be taken for dense ones"
    if form == "sglang_stat" and (empty := int((~loads.counts.any(axis=(1, 2))).sum())):
        yield f"{empty} windows without any load: they will be taken for steps that were never filled"
    if form == "tensorrt_llm":
        yield from tensorrt_llm.made_up(loads)


_Read = tuple[str, Callable[[], LoadSet]]


def _folder(path: Path) -> _Read:
    if (path / npz.RUN_LOADS).is_file():
        return "run", lambda: npz.counts_of(path / npz.RUN_LOADS, path, in_order=True)
    if (path / tensorrt_llm.META).exists():
        return "tensorrt_llm", lambda: tensorrt_llm.loads_of(path)
    dumps = sorted(path.glob("*.pt"))
    if not dumps:
        why = f"it has no {npz.RUN_LOADS}, no {tensorrt_llm.META} and no .pt files"
        raise ScenarioError("E040", "this folder holds no loads of a known form", why=why, where=str(path))
    return _dumps(path, dumps)


def _dumps(path: Path, files: list[Path]) -> _Read:
    """SGLang's dumps: the files of all ranks, read one by one, or the only one of rank 0."""
    first = load_torch(files[0])
    if sglang_dump.is_per_pass(first):
        others = ((file, load_torch(file)) for file in files[1:])
        return "sglang_per_pass", lambda: sglang_dump.per_pass_loads(chain([(files[0], first)], others), path)
    if len(files) > 1:
        raise bad_content(path, "the folder holds several dumps", f"{len(files)} .pt files", "name one of them")
    return "sglang_stat", lambda: sglang_dump.stat_loads(files[0], first)


def _file(path: Path, asked: Reading) -> _Read:
    head = head_of(path)
    if head[:4] == b"PK\x03\x04" or path.suffix == ".npz":
        if path.suffix != ".npz" and is_torch_file(path):
            return _dumps(path, [path])
        if npz.has_tokens(path):
            return "npz_tokens", lambda: npz.tokens_of(path, asked.tokens_per_window)
        return "npz", lambda: npz.counts_of(path, path)
    if head[:1] == b"\x80":
        return _dumps(path, [path])
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "vllm", lambda: vllm.loads_of(path, asked.model)
    if head.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    raise _unknown(path, f"it begins with {head[:8]!r}", head.startswith((b"num_slots", b"\x93NUMPY")))


def _json(path: Path) -> _Read:
    data = load_json(path)
    if isinstance(data, dict) and data.get("format") == neutral.LOADS:
        return "json", lambda: neutral.loads_of(path, data)
    if isinstance(data, dict) and "logical_count" in data:
        return "sglang", lambda: sglang.loads_of(path, data)
    if not isinstance(data, dict):
        raise _unknown(path, "a list", True)
    placed = data.get("format") == neutral.PLACEMENT or bool({"physical_to_logical_map", "layer_list"} & set(data))
    raise _unknown(path, f"keys {', '.join(map(json.dumps, sorted(data)))[:80]}", placed)


def _unknown(path: Path, why: str, placement: bool) -> ScenarioError:
    """E041 with a hint of what would be known, or where a placement goes."""
    hint = "it looks like a placement: those go to --current, or to eplbctl convert placement"
    if not placement:
        hint = "known are " + "; ".join(f"{form.whose}: {form.what}" for form in LOADS.values()).replace("`", "")
    return bad_content(path, "this holds no loads of a known form", why, hint)
