"""What a balancer costs that counts, sums and hands over on several GPUs: its choreographies and static routing.

    torchrun --nproc-per-node 2 -m benchmarks.gpu.choreographies --out FILE.json

All variants live in the same ranks and process groups, read the same weights and replay CUDA graphs in blocks, forward
and backward (A B C D D C B A), so that what drifts meets all alike; a step's time is its slowest rank's. Nothing moves:
`moving` has that. Exit 2 where there is no GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import torch
from tabulate import tabulate

from benchmarks.gpu.layer_cases import Case
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.ranks import Ranks, joined
from benchmarks.gpu.stacks import Stack, build, share_weights
from benchmarks.gpu.timing import ceilings, time_without_pause
from moe_eplb.balancer import BalancerOptions
from moe_eplb.core.events import NullSink
from moe_eplb.core.samples import compare
from moe_eplb.device.cuda import CudaDevice

__all__ = ["SHAPES", "Shape", "main"]

_BLOCK = 9
_SPARE = 2


@dataclass(frozen=True)
class Shape:
    """A case, with so many tokens on each rank, in so many layers."""

    case: Case
    layers: int


SHAPES = {
    "decode": Shape(Case("qwen3-30b, 128 tokens a rank", 128, 128, 2048, 768, 8), 4),
    "prefill": Shape(Case("qwen3-30b, 4096 tokens a rank", 4096, 128, 2048, 768, 8), 4),
    "wide": Shape(Case("deepseek-v3 slice of 32 experts a rank, 2048 tokens a rank", 2048, 64, 7168, 2048, 8), 2),
}


@dataclass(frozen=True)
class Variant:
    """How a stack is balanced."""

    overlap: Literal["static", "serial", "before", "after", "once"]
    """Or "once": as after, with one sum over the ranks for all layers."""

    def build(self, shape: Shape, ranks: Ranks) -> Stack:
        """This rank's layers."""
        dynamic, before = self.overlap != "static", self.overlap == "before"
        device = CudaDevice(NullSink(), index=ranks.rank, serial=self.overlap == "serial")
        once = self.overlap == "once"
        options = BalancerOptions(
            resident=True, spare_slots=_SPARE, overlap="before" if before else "after",
            reduction="iteration" if once else "layer", commit_delay=3 if once else 1,
        )  # fmt: skip
        slots = shape.case.experts + shape.case.experts // 16 * ranks.size
        stack = build(
            shape.case, shape.layers, device, updates=shape.layers if dynamic else 0, slots=slots, options=options,
            ranks=ranks, statistics="global_ids" if before else "local_ids",
        )  # fmt: skip
        return stack


VARIANTS = {name: Variant(name) for name in ("static", "serial", "before", "after", "once")}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=32), default=400, show_default=True, help="Replays of each variant.")
@click.option("--only", multiple=True, type=click.Choice(list(SHAPES)), help="Only these shapes.")
@click.option("--layers", type=click.IntRange(min=1), help="So many layers, and not as many as a shape has.")
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these, static first."
)
def main(out: Path, replays: int, only: Sequence[str], layers: int | None, variants: Sequence[str]) -> None:
    """Time the choreographies against each other and against static routing."""
    require_gpus()
    with torch.inference_mode(), joined() as ranks:
        limits = ceilings()
        result = {**machine("benchmarks.gpu.choreographies", ranks.size), "ranks": ranks.size, "ceilings": limits}
        result["shapes"] = shapes = {}
        for name in only or SHAPES:
            shape = SHAPES[name] if layers is None else replace(SHAPES[name], layers=layers)
            shapes[name] = _measure(shape, variants or list(VARIANTS), ranks, replays)
            if ranks.rank == 0:
                write(out, result)
                _print(name, shapes[name])


def _measure(shape: Shape, variants: Sequence[str], ranks: Ranks, replays: int) -> dict[str, Any]:
    stacks = {name: VARIANTS[name].build(shape, ranks) for name in variants}
    share_weights(list(stacks.values()))
    try:
        for stack in stacks.values():
            stack.capture()
        replay: dict[str, Callable[[], None]] = {name: partial(stack.replay) for name, stack in stacks.items()}
        ranks.barrier()
        samples = ranks.slowest(time_without_pause(replay, replays, _BLOCK))
        ranks.barrier()
        differ = _differ(stacks)
    finally:
        for stack in stacks.values():
            stack.balancer.shutdown()
    del stacks, replay
    gc.collect()
    torch.cuda.empty_cache()
    return {"case": shape.case.name, "layers": shape.layers, "outputs_differ": differ, **summary(shape, samples)}


def _differ(stacks: Mapping[str, Stack]) -> float:
    """The largest difference of outputs from those of static routing, against the largest of these."""
    outputs = {name: stack.graph.result for name, stack in stacks.items() if stack.graph is not None}
    static = outputs["static"]
    return max(float((found - static).abs().max() / static.abs().max()) for found in outputs.values())


def summary(shape: Shape, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Each variant against the one before it and against static routing, and what it costs a layer, in us."""
    size = 2 * (_BLOCK - 1)  # a block and its counterpart in reversed order
    rounds = [[found[at : at + size] for at in range(0, len(found) - size + 1, size)] for found in samples.values()]
    compared = {name: asdict(c) for name, c in zip(samples, compare(rounds), strict=True)}
    static = compared["static"]["median_ms"]
    cost = {name: (c["median_ms"] - static) / shape.layers * 1e3 for name, c in compared.items()}
    return {"compared": compared, "cost_us_per_layer": cost, "samples_ms": dict(samples)}


def _print(name: str, found: Mapping[str, Any]) -> None:
    rows = [
        [f"{name}, {variant}", c["median_ms"], c["p99_ms"], c["ratio"], c["low"], c["high"], c["step_ratio"],
         c["step_low"], c["step_high"], found["cost_us_per_layer"][variant]]
        for variant, c in found["compared"].items()
    ]  # fmt: skip
    heads = ["variant", "ms", "p99", "to static", "low", "high", "to one before", "low", "high", "us a layer"]
    click.echo(tabulate(rows, headers=heads, floatfmt=".4f"))


if __name__ == "__main__":
    main()
