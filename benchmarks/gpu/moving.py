"""Steps of four MoE layers on one GPU, or on several, while experts of every other layer move.

    python -m benchmarks.gpu.moving --out FILE.json
    torchrun --nproc-per-node 2 -m benchmarks.gpu.moving --tokens 4096 --slots 52 --out FILE.json
    torchrun --nproc-per-node 2 -m benchmarks.gpu.moving --model deepseek-v3 --tokens 2048 --slots 22 --out FILE.json

On one GPU weights come from host memory, on several each expert comes from the GPU before. Four variants in turns, in
blocks and in the order A B C D D C B A: static routing; static routing beside a plain copy of as many bytes a step; a
balancer that idles; a balancer that moves experts in every step, those of a layer in every other one. All replay CUDA
graphs. A step's time is its slowest rank's. The outputs of the moving layers are compared with the static ones' after
each round of blocks. Exit 2 where there is no GPU, 1 where outputs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from benchmarks.gpu.layer_cases import CASES, Case
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.ranks import Ranks, joined
from benchmarks.gpu.stacks import ForcedOptions, Stack, build
from benchmarks.gpu.timing import ceilings
from moe_eplb.core.events import NullSink
from moe_eplb.device.copier import Copier
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.device.cuda_copier import CudaCopier

__all__ = ["main", "summary"]

_MODELS = {"qwen3-30b": "qwen3-30b, 8192 tokens", "deepseek-v3": "deepseek-v3 slice, 4096 tokens"}
"""The case of each; of a slice's experts each rank has as many."""
_LAYERS = 4
_UPDATES, _DELAY = 2, 2
"""Every other layer hands over in an iteration; a layer is free again two iterations later."""
_FILL = 5
_ASKED = {"p99_to_plain_copy": 1.02, "median_to_idle": 1.01, "of_link": 0.70}
_OF_PLAIN_COPY = {"host": 0.95, "peer": 0.90}
_ROUNDING = 0.02
"""Of the largest output: ranks add what they have computed, so that it tells who has computed what."""


class TimedCopies(CudaDevice):
    """Notes when the copies of each plan began and ended on the device."""

    def __init__(self, index: int) -> None:
        super().__init__(NullSink(), index=index)
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def new_copier(self) -> Copier:
        return _TimedCopier(self._copies, self.spans)


class _TimedCopier(CudaCopier):
    def __init__(self, stream: torch.cuda.Stream, spans: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        super().__init__(stream)
        self._spans = spans

    def _copy(self, *columns: NDArray[np.uint64]) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(self._stream)
        super()._copy(*columns)
        end.record(self._stream)
        self._spans.append((begin, end))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--model", type=click.Choice(list(_MODELS)), default="qwen3-30b", show_default=True)
@click.option("--steps", type=click.IntRange(min=200), default=2000, show_default=True, help="Steps of each variant.")
@click.option("--block", type=click.IntRange(min=10), default=100, show_default=True, help="Steps without a change.")
@click.option("--slots", type=click.IntRange(min=2), default=14, show_default=True, help="Slots that move in a layer.")
@click.option("--awake", is_flag=True, help="The updater's thread waits awake.")
@click.option("--tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens of each rank.")
def main(out: Path, model: str, steps: int, block: int, slots: int, awake: bool, tokens: int) -> None:
    """Time steps while experts move."""
    require_gpus()
    with torch.inference_mode(), joined() as ranks:
        measured = ceilings()
        found = _measure(_case(model, tokens, ranks.size), ranks, steps, block, slots, awake)
        result = {**machine("benchmarks.gpu.moving", ranks.size), "ceilings": measured, **found}
        if ranks.rank == 0:
            write(out, result)
            _print(result)
    if result["outputs_differ"]:
        click.echo("outputs of layers whose experts move differ from those of static ones", err=True)
        raise SystemExit(1)


def _case(model: str, tokens: int, ranks: int) -> Case:
    case = next(case for case in CASES if case.name == _MODELS[model])
    experts = case.experts * (ranks if "slice" in case.name else 1)
    return replace(case, name=f"{model}, {tokens} tokens", tokens=tokens, experts=experts)


def _measure(case: Case, ranks: Ranks, steps: int, block: int, slots: int, awake: bool) -> dict[str, Any]:
    device = TimedCopies(ranks.rank)
    source: Literal["host", "peer"] = "host" if ranks.size == 1 else "peer"
    options = ForcedOptions(
        resident=True, spare_slots=slots, forced=slots, empty_group="never", weights_from=source, commit_delay=_DELAY,
        awake_updater=awake,
    )  # fmt: skip
    # Between ranks an expert moves that the other does not have: without replicas.
    held = case.experts if ranks.size > 1 else case.experts + case.experts // 16
    static, moving = (
        build(case, _LAYERS, device, updates=updates, slots=held, options=options, ranks=ranks)
        for updates in (0, _UPDATES)
    )
    try:
        for stack in (static, moving):
            stack.capture()
        plain = PlainCopies(moving, slots, ranks)
        samples, differ = _in_blocks(static, moving, plain, steps, block, ranks)
        staged = moving.moves.bytes / _copied_s(device) / 1e9
        alone = plain.alone()
    finally:
        ranks.barrier()
        for stack in (static, moving):
            stack.balancer.shutdown()
    counted, beside, limit = moving.moves, plain.beside(), _OF_PLAIN_COPY[source]
    step_bytes = counted.bytes / (steps * (1 + _FILL / block))
    return {
        "case": case.name, "layers": _LAYERS, "ranks": ranks.size, "weights_from": source,
        "layers_per_step": _UPDATES, "commit_delay": _DELAY, "awake": awake,
        "slots_moved_per_layer": slots, "block": block,
        "bytes_per_step": plain.bytes_of_layer * _UPDATES, "commits": counted.commits, "slots_moved": counted.slots,
        "bytes_moved": counted.bytes, "drops": counted.drops, "waits_s": sorted(counted.stalls)[-20:],
        "waits": len(counted.stalls), "outputs_differ": any(ranks.all(differ)), "plain_copy_gb_per_s": alone,
        "plain_copy_beside_compute_gb_per_s": beside,
        "staged_gb_per_s": staged, **summary(samples, step_bytes, alone, beside, staged, limit),
        "samples_ms": samples,
    }  # fmt: skip


class PlainCopies:
    """Copies of as many bytes as the balancer moves in a layer and step, from the same memory: the host's, or another
    GPU's cells.
    """

    def __init__(self, stack: Stack, slots: int, ranks: Ranks) -> None:
        self._stream = torch.cuda.Stream()
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        layer = stack.balancer.layers[0]
        for number, cell in enumerate(stack.layers[0].experts.by_cell()[:slots]):
            if ranks.size == 1:
                source = {name: layer.updates.host.host_tensor(number, name) for name in cell}
            else:
                source = layer._publisher._source._cells[ranks.rank - 1][number]  # type: ignore[attr-defined]
            self._pairs += [(torch.empty_like(like), source[name]) for name, like in cell.items()]
        self.bytes_of_layer = sum(source.numel() * source.element_size() for _, source in self._pairs)

    def enqueue(self) -> None:
        """A layer's copies for each layer that moves, once the current stream has come here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_UPDATES):
                self._timed_copy()

    def beside(self) -> float:
        """GB/s of the copies that have been enqueued; the median."""
        return median(self.bytes_of_layer / begin.elapsed_time(end) / 1e6 for begin, end in self._spans)

    def alone(self) -> float:
        """GB/s of one layer's copies, when nothing else runs; the median of 50."""
        before = len(self._spans)
        with torch.cuda.stream(self._stream):
            for _ in range(50):
                self._timed_copy()
        self.wait()
        alone, self._spans = self._spans[before:], self._spans[:before]
        return median(self.bytes_of_layer / begin.elapsed_time(end) / 1e6 for begin, end in alone)

    def wait(self) -> None:
        """Return when all copies are done."""
        self._stream.synchronize()

    def _timed_copy(self) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
        end.record()
        self._spans.append((begin, end))


def _in_blocks(
    static: Stack, moving: Stack, plain: PlainCopies, steps: int, block: int, ranks: Ranks
) -> tuple[dict[str, list[float]], bool]:
    """Milliseconds of each step by variant, and whether outputs ever differed."""

    def beside_copy() -> None:
        plain.enqueue()
        static.replay()

    variants: dict[str, tuple[Callable[[], None], bool]] = {
        "static": (static.replay, False), "plain_copy": (beside_copy, False),
        "idle": (moving.replay, False), "moving": (moving.replay, True),
    }  # fmt: skip
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order, differ, turn = list(variants), False, 0
    while len(samples["static"]) < steps:
        for name in order if turn % 2 == 0 else reversed(order):
            step, moves = variants[name]
            moving.updating(moves)
            samples[name] += _block(step, block)
            plain.wait()
        turn += 1
        differ |= not _alike(static, moving, ranks)
    moving.settle()
    return ranks.slowest(samples), differ


def _alike(static: Stack, moving: Stack, ranks: Ranks) -> bool:
    """Whether the latest outputs are the same, to the last bit where one rank has computed all of them."""
    assert static.graph is not None
    assert moving.graph is not None
    a, b = static.graph.result, moving.graph.result
    return torch.equal(a, b) if ranks.size == 1 else float((a - b).abs().max() / b.abs().max()) <= _ROUNDING


def _block(step: Callable[[], None], count: int) -> list[float]:
    """Steps behind each other, after some that fill the queue and let moves begin."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for _ in range(_FILL):
        step()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.current_stream().synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)]


def _copied_s(device: TimedCopies) -> float:
    """Seconds of all plans' copies."""
    torch.cuda.synchronize()
    seconds: float = sum(begin.elapsed_time(end) for begin, end in device.spans) / 1e3
    return seconds


def summary(
    samples: Mapping[str, Sequence[float]], step_bytes: float, alone: float, beside: float, staged: float,
    of_plain_copy: float,
) -> dict[str, Any]:  # fmt: skip
    """Medians and 99th percentiles, their ratios, and what was reached."""
    middle = {name: median(found) for name, found in samples.items()}
    late = {name: quantiles(found, n=100)[98] for name, found in samples.items()}
    rate = step_bytes / middle["moving"] / 1e6
    seen = {
        "p99_to_plain_copy": late["moving"] / late["plain_copy"], "median_to_idle": middle["moving"] / middle["idle"],
        "of_link": rate / alone, "of_plain_copy": staged / beside,
    }  # fmt: skip
    asked = {**_ASKED, "of_plain_copy": of_plain_copy}
    reached = {name: seen[name] <= asked[name] for name in ("p99_to_plain_copy", "median_to_idle")}
    reached |= {name: seen[name] >= asked[name] for name in ("of_link", "of_plain_copy")}
    return {
        "median_ms": middle, "p99_ms": late, "gb_per_s": rate, "seen": seen, "asked": asked, "reached": reached,
        "median_to_static": middle["moving"] / middle["static"],
    }  # fmt: skip


def _print(result: Mapping[str, Any]) -> None:
    rows = [[name, value, result["p99_ms"][name]] for name, value in result["median_ms"].items()]
    click.echo(tabulate(rows, headers=["variant", "median ms", "p99 ms"], floatfmt=".3f"))
    rows = [[name, result["asked"][name], value, "yes" if result["reached"][name] else "no"]
            for name, value in result["seen"].items()]  # fmt: skip
    click.echo(tabulate(rows, headers=["what", "asked", "seen", "reached"], floatfmt=".4f"))
    click.echo(
        f"{result['slots_moved']} slots in {result['commits']} commits, {result['drops']} plans dropped, "
        f"{result['waits']} waits; {result['gb_per_s']:.1f} GB/s of {result['plain_copy_gb_per_s']:.1f}"
    )


if __name__ == "__main__":
    main()
