"""What of the balancer's work is hidden behind the model's, read from a trace of replays on several GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.gpu.hidden --out FILE.json

The torch profiler records replays of static routing, then of layers whose experts move, `--slots` of a layer on each
rank in every fourth step. `moe_eplb.analysis` tells what each kernel is and what hides it. What the main stream loses
is taken twice: from the trace, as its idle time beyond that of static routing, and without a profiler, as the
difference of step times of the two in turns. Exit 2 where there is no GPU.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import click
import numpy as np
import torch
from tabulate import tabulate

from benchmarks.gpu.choreographies import SHAPES, Shape
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.ranks import Ranks, joined
from benchmarks.gpu.stacks import ForcedOptions, Stack, build
from benchmarks.gpu.timing import ceilings, time_without_pause
from moe_eplb.analysis.capture import ROLE_CODE, Capture
from moe_eplb.analysis.intervals import intervals, length, subtract, union
from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.role_table import load_role_table, role_table_of
from moe_eplb.analysis.roles import prepare, unknown_names
from moe_eplb.analysis.work import Work, work_of_capture
from moe_eplb.core.events import NullSink, Role
from moe_eplb.core.samples import paired_difference
from moe_eplb.device.cuda import CudaDevice

__all__ = ["main"]

_RULES = {
    "kernels": [
        {"role": "eplb_allreduce", "name": "^ncclDevKernel_AllReduce"},  # the dispatch makes none
        {"role": "eplb_migrate", "name": r"^Memcpy (HtoD|PtoP|DtoD)"},  # the layers copy nothing so
    ]
}
_KINDS = ("statistic", "reduction", "handover", "migration")
_ASKED = 0.95
_BALANCER = (Role.EPLB_STATISTIC, Role.EPLB_ALLREDUCE, Role.EPLB_SIGNAL, Role.EPLB_MIGRATE)
_LAYERS = {"decode": 16}
"""Decode steps of few layers end before the profiler lets the host launch the next."""
_BLOCK = 9
_WARM_UP = 6
_DELAY = 4
"""Iterations from hand-over to commit, in each of which so large a part of the layers hands over: the profiler makes
launches slow, and a host that must wait for plans would not be ahead of the device."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--steps", type=click.IntRange(min=4), default=40, show_default=True, help="Replays in the trace.")
@click.option("--replays", type=click.IntRange(min=32), default=208, show_default=True, help="Of the step times.")
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True, help="Slots that move in a layer.")
@click.option("--only", type=click.Choice(list(SHAPES)), multiple=True, default=["prefill", "decode"])
@click.option("--awake", is_flag=True, help="The updater's thread waits awake.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the first rank's traces.")
def main(
    out: Path, steps: int, replays: int, slots: int, only: tuple[str, ...], awake: bool, keep: Path | None
) -> None:  # fmt: skip
    """Measure hidden shares and the main stream's loss."""
    require_gpus()
    with torch.inference_mode(), joined() as ranks:
        limits = ceilings()
        result = {**machine("benchmarks.gpu.hidden", ranks.size), "ranks": ranks.size, "ceilings": limits, "shapes": {}}
        for name in only:
            shape = replace(SHAPES[name], layers=_LAYERS.get(name, SHAPES[name].layers))
            result["shapes"][name] = _measure(name, shape, ranks, steps, replays, slots, awake, keep)
            if ranks.rank == 0:
                write(out, result)
                _print(name, result["shapes"][name])


def _measure(
    name: str, shape: Shape, ranks: Ranks, steps: int, replays: int, slots: int, awake: bool, keep: Path | None
) -> dict[str, Any]:
    source: Literal["host", "peer"] = "peer" if ranks.size > 1 else "host"
    static, moving = (_stack(shape, ranks, slots, awake, moves) for moves in (None, source))
    try:
        for stack in (static, moving):
            stack.capture()
        moving.updating(True)
        variants: dict[str, Callable[[], None]] = {"static": static.replay, "moving": moving.replay}
        ranks.barrier()
        samples = ranks.slowest(time_without_pause(variants, replays, _BLOCK))
        ranks.barrier()
        seen = ranks.all(_traced(variants, steps, ranks, None if keep is None else keep / f"{name}.json"))
        moving.settle()
        counted = moving.moves
    finally:
        ranks.barrier()
        for stack in (static, moving):
            stack.balancer.shutdown()
    del static, moving, variants, stack
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "case": shape.case.name, "layers": shape.layers, "slots_moved_per_layer": slots,
        "commit_delay": _DELAY, "awake": awake, "steps": steps,
        "commits": counted.commits, "drops": counted.drops, "waits": len(counted.stalls),
        **summary([found for found in seen if isinstance(found, dict)], samples), "ranks_seen": seen,
        "samples_ms": samples,
    }  # fmt: skip


def _stack(shape: Shape, ranks: Ranks, slots: int, awake: bool, source: Literal["host", "peer"] | None) -> Stack:
    options = ForcedOptions(
        resident=True, spare_slots=slots, forced=slots, empty_group="never", weights_from=source or "host",
        commit_delay=_DELAY, awake_updater=awake,
    )  # fmt: skip
    device = CudaDevice(NullSink(), index=ranks.rank)
    updates = shape.layers // _DELAY if source else 0
    return build(
        shape.case, shape.layers, device, updates=updates, slots=shape.case.experts, options=options, ranks=ranks
    )


def _traced(variants: Mapping[str, Callable[[], None]], steps: int, ranks: Ranks, keep: Path | None) -> dict[str, Any]:
    """What this rank's trace says of `steps` replays of each variant."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with tempfile.TemporaryDirectory(prefix="moe_eplb_hidden_") as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for name, step in variants.items():
                for _ in range(_WARM_UP):
                    step()
                ranks.barrier()
                with record_function(f"measured {name}"):
                    for _ in range(steps):
                        step()
                    torch.cuda.synchronize()
                ranks.barrier()
        profiler.export_chrome_trace(str(path))
        capture = prepare(read_capture(path), role_table_of(_RULES, "hidden").before(load_role_table()))
        if keep is not None and ranks.rank == 0:
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes(path.read_bytes())
    found = {name: _seen(_during(capture, f"measured {name}"), steps) for name in variants}
    return {**found, "unknown": [time.name for time in unknown_names(capture, capture.gpu["role"])]}


def _during(capture: Capture, text: str) -> Capture:
    """The GPU events of a stretch that the host marked, at whose ends the device was idle."""
    ranges = capture.ranges[capture.ranges["text"] == capture.names.index(text)]
    begin, end = int(ranges["start"].min()), int(ranges["end"].max())
    gpu = capture.gpu
    return replace(capture, gpu=gpu[(gpu["start"] >= begin) & (gpu["end"] <= end)])


def _seen(capture: Capture, steps: int) -> dict[str, Any]:
    work = work_of_capture(capture)
    shares = {}
    for kind in _KINDS:
        whole = measure(work, PAIRS[kind]).whole
        shares[kind] = {"us": whole.total / 1e3, "hidden_us": whole.hidden / 1e3, "share": whole.overlap}
    balancer, lasted = work.of(*_BALANCER), work.end.max() - work.start.min()
    return {
        "balancer_events": int(balancer.sum()), "shares": shares, "waits_us": _length(work, work.of(Role.EPLB_WAIT)),
        "main_idle_us_per_step": _idle(work) / steps / 1e3, "step_us": lasted / steps / 1e3,
        "roles": {role: int((work.role == code).sum()) for role, code in ROLE_CODE.items()},
    }  # fmt: skip


def _length(work: Work, mask: np.ndarray) -> float:
    return length(union(intervals(work.start[mask], work.end[mask]))) / 1e3


def _idle(work: Work) -> int:
    """ns in which the main stream did nothing between its first and its last work."""
    main = union(intervals(work.start[work.main], work.end[work.main]))
    return length(subtract(intervals([main[0, 0]], [main[-1, 1]]), main))


def summary(seen: list[dict[str, Any]], samples: Mapping[str, list[float]]) -> dict[str, Any]:
    """Shares over all ranks, and the main stream's loss by the trace and by the clock."""
    shares = {kind: _share([one["moving"]["shares"][kind] for one in seen]) for kind in _KINDS}
    size = _BLOCK - 1
    blocks = {
        name: [median(found[at : at + size]) for at in range(0, len(found), size)] for name, found in samples.items()
    }
    static = median(samples["static"])
    clock = paired_difference(blocks["static"], blocks["moving"])
    idle = max(one["moving"]["main_idle_us_per_step"] - one["static"]["main_idle_us_per_step"] for one in seen)
    return {
        "balancer_events": sum(one["moving"]["balancer_events"] for one in seen), "shares": shares, "asked": _ASKED,
        "reached": {kind: share is not None and share >= _ASKED for kind, share in shares.items()},
        "static_ms": static, "moving_ms": median(samples["moving"]),
        "stall_by_trace_us": idle, "stall_by_trace_share": idle / static / 1e3,
        "difference_us": [clock.median * 1e3, clock.low * 1e3, clock.high * 1e3],
        "difference_share": clock.median / static,
    }  # fmt: skip


def _share(ranks: list[dict[str, float]]) -> float | None:
    total = sum(rank["us"] for rank in ranks)
    return sum(rank["hidden_us"] for rank in ranks) / total if total else None


def _print(name: str, found: Mapping[str, Any]) -> None:
    rows = [[kind, _ASKED, share] for kind, share in found["shares"].items()]
    click.echo(tabulate(rows, headers=[f"{name}: hidden", "asked", "seen"], floatfmt=".4f"))
    median_us, low, high = found["difference_us"]
    click.echo(
        f"{found['balancer_events']} balancer events, {found['commits']} commits, {found['drops']} dropped; main "
        f"stream idle beyond static {found['stall_by_trace_us']:.1f} us a step ({found['stall_by_trace_share']:.4f}); "
        f"step times differ by {median_us:.1f} us ({low:.1f} to {high:.1f}; {found['difference_share']:.4f}) of "
        f"{found['static_ms'] * 1e3:.0f}"
    )
    unknown = sorted({text for seen in found["ranks_seen"] for text in seen["unknown"]})
    click.echo(f"kernels of no known role: {', '.join(unknown) or 'none'}")


if __name__ == "__main__":
    main()
