"""Time of the MoE layer on one GPU, against the obvious composition in torch and against its two grouped GEMMs alone.

    python -m benchmarks.gpu.moe_layer --out FILE.json

Every variant is captured into CUDA graphs, one for each of several input sets, and replayed in turns with the others.
The layer's output is compared with the composition's first. Exit 2 where there is no GPU, 1 where outputs differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tabulate import tabulate

from benchmarks.gpu.layer_cases import (
    CASES,
    Case,
    Inputs,
    gemms_alone,
    group,
    make_inputs,
    make_layer,
    obvious,
    untimed_cuda,
)
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.timing import Graphs, ceilings, time_in_turns, told
from moe_eplb.device import Device
from moe_eplb.moe import WideEPMoE

__all__ = ["main", "summary"]

_SETS = 4
_TOLERANCE = 0.02


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=2), default=200, show_default=True, help="Replays of each variant.")
@click.option("--only", multiple=True, help="Only cases whose name contains this.")
def main(out: Path, replays: int, only: Sequence[str]) -> None:
    """Time the MoE layer on one GPU."""
    require_gpus()
    cases = [case for case in CASES if not only or any(part in case.name for part in only)]
    with torch.inference_mode():
        device = untimed_cuda()
        limits, found = ceilings(), [_measure(case, device, replays) for case in cases]
    result = {**machine("benchmarks.gpu.moe_layer"), "replays": replays, "ceilings": limits, "cases": found}
    write(out, result)
    _print(found)
    click.echo(told(limits))
    if wrong := [case["name"] for case in found if case["relative_error"] > _TOLERANCE]:
        click.echo(f"outputs differ from the composition's by more than {_TOLERANCE}: {', '.join(wrong)}", err=True)
        raise SystemExit(1)


def _measure(case: Case, device: Device, replays: int) -> dict[str, Any]:
    layer = make_layer(case, device)
    sets = [make_inputs(case, seed, device.torch_device) for seed in range(_SETS)]
    error = _relative_error(layer, case, sets[0])
    kernels = _kernels(layer, sets)
    samples = _samples(layer, case, sets, replays)
    del layer, sets
    torch.cuda.empty_cache()
    return {
        "name": case.name,
        "tokens": case.tokens,
        "experts": case.experts,
        "hidden": case.hidden,
        "intermediate": case.intermediate,
        "top_k": case.top_k,
        "relative_error": error,
        **summary(case, samples),
        "kernels": kernels,
        "samples_ms": samples,
    }


def _samples(layer: WideEPMoE, case: Case, sets: Sequence[Inputs], replays: int) -> dict[str, list[float]]:
    weights = (layer.experts.weight("w3_w1"), layer.experts.weight("w2"))
    pool = torch.cuda.graph_pool_handle()
    grouped = [group(inputs, case.top_k, *weights) for inputs in sets]
    work = {
        "obvious": [partial(obvious, inputs, case.top_k, *weights) for inputs in sets],
        "layer": [partial(layer, inputs.x, inputs.logits, [case.tokens]) for inputs in sets],
        "gemms": [partial(gemms_alone, given, *weights) for given in grouped],
    }
    graphs = {name: Graphs(do, pool) for name, do in work.items()}
    return time_in_turns({name: graph.replay for name, graph in graphs.items()}, replays)


def summary(case: Case, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians, ratios and whether the case reached what is asked of it, from samples in ms."""
    medians = {name: median(found) for name, found in samples.items()}
    speedup, share = medians["obvious"] / medians["layer"], medians["gemms"] / medians["layer"]
    return {
        "median_ms": medians,
        "tflops": {name: case.flop / value / 1e9 for name, value in medians.items()},
        "speedup": speedup,
        "gemm_share": share,
        "asked": {"speedup": case.least_speedup, "gemm_share": case.least_gemm_share},
        "reached": (case.least_speedup or 0) <= speedup and (case.least_gemm_share or 0) <= share,
    }


def _relative_error(layer: WideEPMoE, case: Case, inputs: Inputs) -> float:
    """Norm of the difference of the layer's output from the composition's, against the norm of that."""
    wanted = obvious(inputs, case.top_k, layer.experts.weight("w3_w1"), layer.experts.weight("w2")).float()
    got = layer(inputs.x, inputs.logits, [case.tokens]).float()
    return float((got - wanted).norm() / wanted.norm())


def _kernels(layer: WideEPMoE, sets: Sequence[Inputs]) -> list[dict[str, Any]]:
    """Name and microseconds of each kernel of one eager forward, in order of their starts."""
    for inputs in sets:
        layer(inputs.x, inputs.logits, [len(inputs.x)])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(sets[0].x, sets[0].logits, [len(sets[0].x)])
        torch.cuda.synchronize()
    done = [event for event in profile.events() if event.device_type.name == "CUDA"]
    done.sort(key=lambda event: event.time_range.start)
    return [{"kernel": event.name, "us": event.time_range.elapsed_us()} for event in done]


def _print(cases: Sequence[Mapping[str, Any]]) -> None:
    """Where the time goes, then a line a case."""
    rows = []
    for case in cases:
        ms, longest = case["median_ms"], sorted(case["kernels"], key=lambda kernel: -kernel["us"])[:7]
        click.echo(f"{case['name']}: {len(case['kernels'])} kernels, error {case['relative_error']:.2g}")
        for kernel in longest:
            click.echo(f"  {kernel['us']:10.1f} us  {kernel['kernel'][:90]}")
        rows.append([case["name"], ms["obvious"], ms["layer"], ms["gemms"], case["speedup"], case["gemm_share"],
                     case["tflops"]["layer"], "yes" if case["reached"] else "no"])  # fmt: skip
    names = ["case", "obvious ms", "layer ms", "GEMMs ms", "speed-up", "GEMM share", "TFLOP/s", "reached"]
    click.echo(tabulate(rows, headers=names, floatfmt=".3f"))


if __name__ == "__main__":
    main()
