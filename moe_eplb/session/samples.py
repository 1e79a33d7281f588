"""The files of a comparison: its variants, and the samples that ranks leave. Importable without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import RunFailed
from moe_eplb.core.scenario import Scenario

__all__ = ["read_samples", "samples_path", "variant_path", "write_variants"]


def variant_path(folder: Path, number: int) -> Path:
    """Where ranks find a variant, counted from 0."""
    return folder / f"variant{number}.yaml"


def write_variants(folder: Path, variants: Sequence[Scenario]) -> None:
    """Leave the variants for the ranks; RunFailed E183 when they cannot be written."""
    try:
        for number, variant in enumerate(variants):
            variant_path(folder, number).write_text(scenarios.dump(variant), encoding="utf-8")
    except OSError as error:
        why = error.strerror or str(error)
        raise RunFailed("E183", "the variants could not be written", why=why, where=str(folder)) from error


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
