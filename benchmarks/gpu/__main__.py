"""All GPU benchmarks, one after another, with their usual arguments.

    python -m benchmarks.gpu --out FOLDER [--gpus 2] [--budget SECONDS] [NAME ...]

What FOLDER has is left out, so that a call which was cut off goes on where it was. Each has a time limit, at which it
and all that it has started ends. Exit 1 unless all of them are there in the end, 2 where there are not enough GPUs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from tabulate import tabulate

from benchmarks.gpu.machine import require_gpus
from moe_eplb.recording.children import run_bounded

__all__ = ["JOBS", "Job", "main"]

_MARK = "MOE_EPLB_GPU_BENCHMARK"
_LIMIT = 2
"""So many times the usual time may one take: compilers and hosts differ."""


@dataclass(frozen=True, slots=True)
class Job:
    """A benchmark, what it is given, the ranks that torchrun starts for it, the GPUs it needs, and its usual time."""

    module: str
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    gpus: int = 1
    usual_s: int = 60

    def command(self, out: Path) -> list[str]:
        """What runs it."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)] if self.ranks > 1 else []
        return [sys.executable, *launcher, "-m", f"benchmarks.gpu.{self.module}", *self.arguments, "--out", str(out)]


def _pair(module: str, *arguments: str, usual_s: int) -> Job:
    return Job(module, arguments, ranks=2, gpus=2, usual_s=usual_s)


def _gain(workload: str) -> Job:
    return Job("gain", ("--layers", "1", "--rounds", "4", "--only", workload), gpus=2, usual_s=130)


JOBS: Mapping[str, Job] = {
    "balancer_cost": Job("balancer_cost", usual_s=105),
    "balancer_cost_24_layers": Job("balancer_cost", ("--only", "128 tokens", "--layers", "24"), usual_s=65),
    "hand_over": Job("hand_over", usual_s=170),
    "moving": Job("moving", usual_s=70),
    "moe_layer": Job("moe_layer", usual_s=90),
    "few_rows": Job("few_rows", usual_s=25),
    "grouped_products": Job("grouped_products", usual_s=40),
    "choreographies_decode": _pair("choreographies", "--only", "decode", usual_s=45),
    "choreographies_decode_16_layers": _pair("choreographies", "--only", "decode", "--layers", "16", usual_s=60),
    "choreographies_prefill": _pair("choreographies", "--only", "prefill", usual_s=50),
    "choreographies_wide": _pair("choreographies", "--only", "wide", usual_s=75),
    "hidden": _pair("hidden", usual_s=50),
    "moving_peers": _pair("moving", "--tokens", "4096", "--slots", "52", usual_s=60),
    "moving_peers_deepseek": _pair(
        "moving", "--model", "deepseek-v3", "--tokens", "2048", "--slots", "22", usual_s=160
    ),
    "gain_zipf": _gain("zipf"),
    "gain_hot": _gain("hot"),
    "gain_drifting": _gain("drifting"),
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(JOBS)), metavar="[NAME ...]")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the JSON files."
)
@click.option("--gpus", type=click.IntRange(1, 2), default=1, show_default=True, help="Those that need so many.")
@click.option("--budget", type=click.FloatRange(min=0), help="Seconds in which all has ended.")
def main(names: Sequence[str], out: Path, gpus: int, budget: float | None) -> None:
    """Run the benchmarks that are asked for, all that need as many GPUs unless they are named."""
    chosen = {name: JOBS[name] for name in names or JOBS if names or JOBS[name].gpus == gpus}
    require_gpus(max(job.gpus for job in chosen.values()))
    out.mkdir(parents=True, exist_ok=True)
    deadline = math.inf if budget is None else time.monotonic() + budget
    rows = []
    for name, job in chosen.items():
        rows.append([name, *_run(job, out / f"{name}.json", deadline)])
        click.echo(f"{name}: {rows[-1][-1]}", err=True)
    click.echo(tabulate(rows, headers=["benchmark", "seconds", "how it went"], floatfmt=".0f"))
    raise SystemExit(not all((out / f"{name}.json").exists() for name in chosen))


def _run(job: Job, target: Path, deadline: float) -> tuple[float | None, str]:
    """Seconds that it took and how it went; its file has its name once it has come to its end."""
    if target.exists():
        return None, "there already"
    begun = time.monotonic()
    if begun + job.usual_s > deadline:
        return None, f"left out: it takes {job.usual_s} s"
    part = target.with_suffix(".part.json")
    part.unlink(missing_ok=True)
    ended = run_bounded(job.command(part), mark=_MARK, timeout_s=min(_LIMIT * job.usual_s, deadline - begun))
    took = time.monotonic() - begun
    if ended.code is None:
        return took, "out of time"
    if ended.code != 0 or not part.exists():
        return took, f"ended with {ended.code}" + (", and wrote nothing" if ended.code == 0 else "")
    part.rename(target)
    return took, "done"


if __name__ == "__main__":
    main()
