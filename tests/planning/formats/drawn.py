"""Loads and placements drawn at random, and files of other stacks made by hand, without the writers under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moe_eplb.core.errors import EplbError
from moe_eplb.planning.loads import LoadSet, Origin
from moe_eplb.planning.placements import PlacementSet

FILES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

COUNTS = np.array([[[3, 0, 5], [1, 1, 1]], [[2, 2, 2], [0, 7, 0]]])
"""Two windows of two layers of three experts."""
EVERYTHING = Origin((7, 8), True, 4, 2, "decode", "deepseek")


@st.composite
def load_sets(draw: st.DrawFn) -> LoadSet:
    """Of every kind: with and without numbers and origin, idle layers and windows, small and huge counts."""
    windows, layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    most = draw(st.sampled_from([1, 50, 1 << 40]))
    counts = np.random.default_rng(draw(st.integers(0, 999))).integers(0, most, (windows, layers, experts))
    counts *= np.array(draw(st.lists(st.sampled_from([0, 1, 1]), min_size=layers, max_size=layers)))[:, np.newaxis]
    counts[0, 0, 0] += 1
    numbered = draw(st.booleans())
    drawn = draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers, unique=True))
    first = draw(st.none() | st.integers(0, 1000))
    gap = draw(st.sampled_from([1, 1, 3]))
    origin = Origin(
        None if first is None else tuple(first + gap * window for window in range(windows)),
        draw(st.sampled_from([None, True])),
        draw(st.none() | st.integers(1, 4)),
        draw(st.none() | st.integers(1, experts)),
        draw(st.sampled_from(["", "prefill"])),
        draw(st.sampled_from(["", "deepseek_v3", "a/b c"])),
    )
    ids = tuple(sorted(drawn)) if numbered else tuple(range(layers))
    return LoadSet(counts, ids, "drawn", (), numbered, origin)


@st.composite
def placements(draw: st.DrawFn, duplicates: bool = False) -> PlacementSet:
    """Every expert has a slot; two replicas of one share a rank only if they may."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    per_rank = draw(st.integers(-(-experts // ranks), experts + (2 if duplicates else 0)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    numbered = draw(st.booleans())
    layers = sorted(draw(st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True)))
    rows = []
    for _ in layers:
        slots = np.arange(ranks * per_rank) % experts
        if duplicates:
            rows.append(rng.permutation(slots))
            continue
        held = [set(slots[r * per_rank : (r + 1) * per_rank].tolist()) for r in range(ranks)]
        filled = [[*h, *[e for e in range(experts) if e not in h][: per_rank - len(h)]] for h in held]
        rows.append([e for h in filled for e in rng.permutation(h).tolist()])
    ids = tuple(layers) if numbered else tuple(range(len(layers)))
    return PlacementSet(np.array(rows, np.int32), ranks, experts, ids, draw(st.sampled_from(["", "drawn"])), numbered)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    """The files that a writer gave, as a file or a folder."""
    path = folder / ("file" if list(files) == [""] else "folder")
    if list(files) == [""]:
        path.write_bytes(files[""])
        return path
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def stat_dump(path: Path, counts: Any, **more: Any) -> Path:
    """What SGLang's recorder writes in mode stat."""
    made = {"rank": 0, "logical_count": torch.as_tensor(np.asarray(counts)), **more}
    torch.save({"average_utilization_rate_over_window": None} | made, path)
    return path


def per_pass_dump(path: Path, rank: int, slots: Any, passes: Sequence[tuple[int, Any]], **more: Any) -> Path:
    """What rank `rank` writes in mode per_pass."""
    records = [
        {
            "forward_pass_id": number, "rank": rank, "gatherer_key": "primary",
            "global_physical_count": torch.as_tensor(np.asarray(counts), dtype=torch.int32),
        }
        for number, counts in passes
    ]  # fmt: skip
    data = {"records": records, "last_physical_to_logical_map": torch.as_tensor(np.asarray(slots))}
    torch.save(data | more, path)
    return path


def statistics(folder: Path, ranks: Sequence[dict[str, Any]], experts: int = 3, top_k: int = 2) -> Path:
    """What TensorRT-LLM records: a tensor an iteration and layer, a file a rank."""
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": experts, "num_experts_per_token": top_k}))
    for rank, tensors in enumerate(ranks):
        save_file({key: np.asarray(value) for key, value in tensors.items()}, folder / f"rank{rank}.safetensors")
    return folder


def vllm_loads(path: Path, tensors: dict[str, Any], version: str | None = "1") -> Path:
    """A load file of vLLM."""
    metadata = None if version is None else {"version": version}
    save_file({name: np.asarray(value) for name, value in tensors.items()}, path, metadata)
    return path


def refused(read: Callable[[], Any], code: str, what: str) -> None:
    """That it is refused so."""
    with pytest.raises(EplbError) as caught:
        read()
    text = str(caught.value)
    assert (caught.value.code, int(caught.value.exit_code)) == (code, 2), text
    assert what in text
    assert caught.value.why, text
    assert len(text) < 1500
