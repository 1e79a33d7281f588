"""The files in which ranks leave the samples of a comparison. Importable without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

__all__ = ["read_samples", "samples_path"]


def samples_path(folder: Path, rank: int) -> Path:
    """Where a rank puts its samples."""
    return folder / f"bench.rank{rank}.json"


def read_samples(folder: Path, ranks: int) -> tuple[list[list[list[float]]], dict[str, Any]]:
    """Milliseconds by variant, round and step, of the slowest rank in each step; and what the ranks ran on."""
    found = [json.loads(samples_path(folder, rank).read_text(encoding="utf-8")) for rank in range(ranks)]
    every = cast("list[list[list[list[float]]]]", [rank["samples_ms"] for rank in found])
    slowest = [
        [[max(steps) for steps in zip(*rounds, strict=True)] for rounds in zip(*variants, strict=True)]
        for variants in zip(*every, strict=True)
    ]
    return slowest, found[0]["device"]
