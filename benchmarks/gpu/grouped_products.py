"""What a rank's two grouped GEMMs cost by how its rows are shared among the slots, on one GPU.

    python -m benchmarks.gpu.grouped_products --out FILE.json

The layer is the one that `gain` takes, and the rows are a rank's in its workloads once they are balanced, or as many
in each slot. torch's kernel computes tiles: what is balanced in rows need not be in time. Exit 2 where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import yaml
from tabulate import tabulate

from benchmarks.gpu import gain
from benchmarks.gpu.layer_cases import Grouped, drawn, gemms_alone
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.timing import ceilings, time_in_turns
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots, plan
from moe_eplb.core.workload import topk_ids

__all__ = ["balanced_rows", "main", "padded"]

_WORKLOADS = {"uniform": {"kind": "uniform"}, "hot": gain.WORKLOADS["hot"], "zipf": gain.WORKLOADS["zipf"]}
_EACH = (768, 769, 896, 1024, 1025)
"""Rows in every slot: around multiples of the tile."""
_TILE = 256
"""Rows that torch 2.11 computes together on Hopper: two blocks of a cluster, 128 each."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=2), default=200, show_default=True, help="Products of each case.")
def main(out: Path, replays: int) -> None:
    """Time the two products for several ways to share the rows out."""
    require_gpus()
    model = gain.MODELS["deepseek-v3"]
    slots = gain.SLOTS["deepseek-v3"] // gain.RANKS
    cases = {name: balanced_rows(workload) for name, workload in _WORKLOADS.items()}
    cases |= {f"{size} in each": np.full(slots, size) for size in _EACH}
    with torch.inference_mode():
        work = _products(cases, slots, model["hidden"], model["intermediate"])
        result = {**machine("benchmarks.gpu.grouped_products"), **model, "ceilings": ceilings()}
        samples = time_in_turns(work, replays)
    result["cases"] = {name: {"rows": rows.tolist(), "samples_ms": samples[name]} for name, rows in cases.items()}
    write(out, result)
    click.echo(_table(cases, {name: median(found) for name, found in samples.items()}))


def balanced_rows(workload: Mapping[str, Any], tokens: int = 4096) -> np.ndarray:
    """Rows of each slot of the first rank, int64 [P / R], in an iteration for whose load all experts were placed."""
    text = gain.scenario_text("deepseek-v3", 1, "hot", tokens)
    text["workload"] = {**workload, "tokens_per_rank": tokens}
    scenario = scenarios.loads(yaml.safe_dump(text), "grouped_products.yaml")
    experts, ranks = scenario.model.experts, scenario.ranks
    load = np.zeros(experts, dtype=np.int64)
    for rank in range(ranks):
        load += np.bincount(np.ravel(topk_ids(scenario, 0, 0, rank)), minlength=experts)
    placed = plan(load, Placement(ranks, experts, initial_slots(experts, ranks, scenario.slots // ranks))).placement
    mine = placed.slot_to_expert[: placed.slots_per_rank]
    shared: np.ndarray = load[mine] // placed.replica_count[mine]
    return shared


def padded(rows: np.ndarray, tile: int = _TILE) -> float:
    """Rows that are computed by tiles of whole slots, against those that are asked for."""
    return float((-(-rows // tile) * tile).sum() / rows.sum())


def _products(
    cases: Mapping[str, np.ndarray], slots: int, hidden: int, intermediate: int
) -> dict[str, Callable[[], object]]:
    draw = partial(drawn, torch.Generator("cuda").manual_seed(1))
    most = max(int(rows.sum()) for rows in cases.values())
    x, activations = draw(most, hidden), draw(most, intermediate)
    weights = draw(slots, 2 * intermediate, hidden) * hidden**-0.5, draw(slots, hidden, intermediate) * 0.02
    ends = {name: torch.tensor(rows.cumsum(), dtype=torch.int32, device="cuda") for name, rows in cases.items()}
    return {name: partial(gemms_alone, Grouped(x, activations, end), *weights) for name, end in ends.items()}


def _table(cases: Mapping[str, np.ndarray], medians: Mapping[str, float]) -> str:
    found = [
        [name, int(rows.sum()), padded(rows), medians[name], medians[name] / rows.sum() * 1e6]
        for name, rows in cases.items()
    ]
    return tabulate(found, headers=["rows", "in all", "computed", "both products, ms", "ns a row"], floatfmt=".3f")


if __name__ == "__main__":
    main()
