"""What a balancer that moves nothing costs on one GPU: layers with it against the same layers with static routing.

    python -m benchmarks.gpu.balancer_cost --out FILE.json

Both read the same weights and are captured into CUDA graphs, each several times, since the time of a graph depends on
which memory it happens to get, and replayed in blocks, in the order A B B A. A third variant has the balancer's spare
cells and none of its work.
Exit 2 where there is no GPU, 1 where outputs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, TypeVar

import click
import torch
from tabulate import tabulate

from benchmarks.gpu.layer_cases import CASES, Case, gemms_alone, group, make_inputs
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.stacks import Stack, build, share_weights
from benchmarks.gpu.timing import Graphs, ceilings, time_in_turns, time_without_pause
from moe_eplb.balancer import BalancerOptions
from moe_eplb.core.events import NullSink
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.moe.stages import UnbalancedStages
from moe_eplb.moe.statistics_path import make_path

__all__ = ["main", "summary"]

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """A case in so many layers, and what the balancer may cost: a share of the layer's time, or us a layer."""

    case: str
    layers: int
    share: float | None = None
    us: float | None = None


BUDGETS = (
    Budget("qwen3-30b, 128 tokens", 8, us=3.0),
    Budget("qwen3-30b, 8192 tokens", 4, share=0.01),
    Budget("deepseek-v3 slice, 4096 tokens", 2, share=0.01),
)
_SPARE = 2
BLOCK = 9
CAPTURES = 4


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=2), default=200, show_default=True, help="Replays of each variant.")
@click.option("--only", multiple=True, help="Only cases whose name contains this.")
@click.option("--layers", type=click.IntRange(min=1), help="So many layers, instead of each case's own number.")
def main(out: Path, replays: int, only: Sequence[str], layers: int | None) -> None:
    """Time layers with an idle balancer against static routing."""
    require_gpus()
    device = CudaDevice(NullSink())
    budgets = [
        replace(budget, layers=layers or budget.layers)
        for budget in BUDGETS
        if not only or any(part in budget.case for part in only)
    ]
    with torch.inference_mode():
        limits, found = ceilings(), [_measure(budget, device, replays) for budget in budgets]
    result = {**machine("benchmarks.gpu.balancer_cost"), "replays": replays, "ceilings": limits, "cases": found}
    write(out, result)
    rows = [[case["name"], case["layer_us"]["static"], case["layer_us"]["spare"], case["layer_us"]["dynamic"],
             case["cost_us"], case["cost_share"], "yes" if case["reached"] else "no"] for case in found]  # fmt: skip
    heads = ["case", "static us/layer", "spare cells", "balanced", "cost us", "share", "reached"]
    click.echo(tabulate(rows, headers=heads, floatfmt=".3f"))
    if any(case["differs"] for case in found):
        click.echo("outputs with and without a balancer differ", err=True)
        raise SystemExit(1)


def _measure(budget: Budget, device: CudaDevice, replays: int) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == budget.case)
    slots = case.experts + case.experts // 16
    options = BalancerOptions(resident=True, spare_slots=_SPARE)
    stacks = {
        name: build(case, budget.layers, device, updates=updates, slots=slots, options=options)
        for name, updates in (("static", 0), ("dynamic", budget.layers))
    }
    share_weights(list(stacks.values()))
    device.graph_pool = torch.cuda.graph_pool_handle()
    try:
        for stack in stacks.values():
            stack.capture()
        # In turns, so that none has the luck of being the first.
        graphs: dict[str, Callable[[], None]] = {
            f"{name} {number}": partial(stack.replay, stack.captured())
            for number in range(CAPTURES)
            for name, stack in stacks.items()
        }
        spares = [_without_balancer(stacks["dynamic"], device.graph_pool) for _ in range(CAPTURES)]
        graphs |= {f"spare {number}": spare.replay for number, spare in enumerate(spares)}
        samples = time_without_pause({**graphs}, replays, BLOCK)
        for stack in stacks.values():
            stack.replay()
        torch.cuda.current_stream().synchronize()
        differs = not _same([stack.graph for stack in stacks.values()])
    finally:
        for stack in stacks.values():
            stack.balancer.shutdown()
    gemms = _gemms(case, stacks["static"], replays)
    del stacks, graphs, spares
    torch.cuda.empty_cache()
    return {
        "name": budget.case, "layers": budget.layers, "slots": slots, "spare_slots": _SPARE, "differs": differs,
        "ceiling_gemms_us": gemms, **summary(budget, samples), "samples_ms": samples,
    }  # fmt: skip


def summary(budget: Budget, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians a layer, the cost as the median over rounds of blocks, and whether the budget was kept.

    Args:
        samples: Milliseconds by variant and number of the capture, such as "static 0". A variant's time is the mean
            over its captures.
    """
    by_capture = {name: median(found) / budget.layers * 1e3 for name, found in samples.items()}
    layer = {name: fmean(_captures(by_capture, name)) for name in ("static", "dynamic", "spare")}
    static, dynamic = (
        [fmean(blocks) for blocks in zip(*map(_blocks, _captures(samples, name)), strict=True)]
        for name in ("static", "dynamic")
    )
    rounds = [(b - a) / budget.layers * 1e3 for a, b in zip(static, dynamic, strict=True)]
    cost = median(rounds)
    share = cost / layer["static"]
    return {
        "layer_us": layer, "layer_us_by_capture": by_capture, "cost_us": cost,
        "cost_us_quartiles": quantiles(rounds, n=4), "cost_share": share,
        "asked": {"share": budget.share, "us": budget.us},
        "reached": (budget.share is None or share <= budget.share) and (budget.us is None or cost <= budget.us),
    }  # fmt: skip


def _captures(by_name: Mapping[str, T], variant: str) -> list[T]:
    """What belongs to the captures of a variant."""
    return [found for name, found in by_name.items() if name.split()[0] == variant]


def _blocks(samples: Sequence[float]) -> list[float]:
    """The median of each block and its counterpart in reversed order."""
    size = 2 * (BLOCK - 1)
    return [median(samples[begin : begin + size]) for begin in range(0, len(samples), size)]


def _without_balancer(stack: Stack, pool: Any) -> torch.cuda.CUDAGraph:
    """The same layers and cells in a graph of which the balancer's stage calls are no part."""
    graph = torch.cuda.CUDAGraph()
    kept = [(layer._stages, layer._statistics) for layer in stack.layers]
    try:
        for layer in stack.layers:
            layer._stages = UnbalancedStages(stack.balancer.device, 0, layer._stages.placement, 0)
            layer._statistics = make_path("local_ids", layer._stages, None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            stack.forward()
    finally:
        for layer, (stages, statistics) in zip(stack.layers, kept, strict=True):
            layer._stages, layer._statistics = stages, statistics
    return graph


def _same(graphs: Sequence[Any]) -> bool:
    """Whether the latest replays left the same hidden states."""
    return bool(torch.equal(graphs[0].result, graphs[1].result))


def _gemms(case: Case, stack: Stack, replays: int) -> float:
    """Microseconds of a layer's two grouped GEMMs and nothing else."""
    weights = [stack.layers[0].experts.weight(name)[: case.experts] for name in ("w3_w1", "w2")]
    grouped = group(make_inputs(case, 0, stack.x.device), case.top_k, *weights)
    graph = Graphs([lambda: gemms_alone(grouped, *weights)], torch.cuda.graph_pool_handle())
    return median(time_in_turns({"gemms": graph.replay}, replays)["gemms"]) * 1e3


if __name__ == "__main__":
    main()
