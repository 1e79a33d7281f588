"""``eplbctl run``: run scenarios, or a run folder once more, and show what came out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.folders import default_name, new_folder, require_free
from eplbctl.options import PATH, Destination, overrides_option, recorder_option
from eplbctl.outcome import worst_exit_code
from eplbctl.output import say
from eplbctl.progress import Progress
from eplbctl.signals import held, released
from eplbctl.targets import Target, load_all, select, targets
from eplbctl.under_nsys import require_recorders, run_under_nsys
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from moe_eplb.analysis.run_folder import RunFolder
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import RunResult

__all__ = ["command"]

RUNS = Path("runs")


@dataclass(frozen=True)
class _Job:
    target: Target
    scenario: Scenario
    folder: Path


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="SCENARIO...")
@overrides_option
@click.option("--ranks", type=int, help="Short for --set ranks=N.")
@click.option("--seed", type=int, help="Short for --set seed=N.")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="Short for --set device=NAME.")
@recorder_option
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Run each so many times.")
@click.option("--out", type=PATH, metavar="DIR", help="The run folder; of several runs, their parent.")
@click.pass_obj
def command(
    argv: Sequence[str], paths: tuple[Path, ...], overrides: tuple[str, ...], ranks: int | None, seed: int | None,
    device: str | None, recorder: str | None, repeat: int, out: Path | None,
) -> ExitCode:  # fmt: skip
    """Run scenarios and show checks, balancedness and moves.

    SCENARIO is a scenario file or a folder of them. A run folder is run again with the same scenario and seed, and
    compared: a run is reproduced when every placement is the same. Each run gets its own folder, by default
    runs/NAME-TIME. Under torchrun the process joins as one rank. The exit code is that of the worst verdict.

    \b
    Examples:
      eplbctl run scenarios/quickstart.yaml
      eplbctl run scenarios/quickstart.yaml --set model.layers=2 --seed 7
      eplbctl run scenarios/quickstart.yaml --recorder torch
      eplbctl run runs/quickstart-20260102T030405Z
      torchrun --nproc-per-node 4 -m eplbctl run scenarios/quickstart.yaml
    """
    chosen = select(targets(paths), (), ())
    changes = [
        *overrides,
        *_shorthands({"ranks": ranks, "seed": seed, "device": device, "record.recorder": recorder}),
    ]
    _refuse_changes(chosen, changes)
    _refuse_damaged(chosen)
    scenarios = load_all(chosen, changes)
    require_recorders(scenarios)
    jobs = _jobs(chosen, scenarios, repeat, out)
    return worst_exit_code(_join(jobs, argv) if _joined() else _run(jobs, changes, argv))


def _shorthands(values: Mapping[str, object]) -> Iterator[str]:
    return (f"{key}={value}" for key, value in values.items() if value is not None)


def _refuse_changes(chosen: Sequence[Target], changes: Sequence[str]) -> None:
    finished = [target.path for target in chosen if target.finished]
    if finished and changes:
        raise UsageError(
            "E007", "a run folder is run again as it was", why=f"changes were given: {', '.join(changes)}",
            hint=f"change its scenario instead: eplbctl run {finished[0]}/scenario.yaml --set {changes[0]}",
        )  # fmt: skip


def _refuse_damaged(chosen: Sequence[Target]) -> None:
    """Raise for a run folder that a new run could not be compared with, before it is run."""
    from moe_eplb.analysis import run_folder

    for target in chosen:
        if target.finished:
            run_folder.load(target.path)


def _jobs(chosen: Sequence[Target], scenarios: Sequence[Scenario], repeat: int, out: Path | None) -> Iterator[_Job]:
    """One job a run. Its folder is chosen when its turn comes, beside those that the runs before it made."""
    single = len(chosen) * repeat == 1
    if single and out is not None and not _follower():
        require_free(out)
    for target, scenario in zip(chosen, scenarios, strict=True):
        for _ in range(repeat):
            yield _Job(target, scenario, out if single and out is not None else _new_folder(out or RUNS, scenario))


def _new_folder(parent: Path, scenario: Scenario) -> Path:
    name = default_name(scenario.name)
    # Rank 0 alone makes the folder and tells the others.
    return parent / name if _follower() else new_folder(parent, name)


def _joined() -> bool:
    from moe_eplb.session import joined

    return joined()


def _follower() -> bool:
    return _joined() and os.environ["RANK"] != "0"


def _run(jobs: Iterable[_Job], changes: Sequence[str], argv: Sequence[str]) -> list[ExitCode]:
    from moe_eplb.recording.profilers import wrapped
    from moe_eplb.session import RankPool

    codes = []
    with held(), RankPool() as pool, released():
        for job in jobs:
            if job.scenario.record.recorder == "nsys" and not wrapped():
                codes.append(_show(job, run_under_nsys(job.scenario, job.target.path, changes, job.folder)))
                continue
            with Progress(job.scenario.name) as progress:
                result = pool.run(job.scenario, job.folder, progress=progress, argv=argv)
            # Under nsys the program that has started this one shows the result.
            codes.append(result.exit_code if wrapped() else _show(job, result))
        pool.close()
    return codes


def _join(jobs: Iterable[_Job], argv: Sequence[str]) -> Iterator[ExitCode]:
    """Every rank of torchrun comes here; rank 0 alone has a result to show."""
    from moe_eplb.session import run_joined

    for job in jobs:
        with Progress(job.scenario.name) as progress:
            result = run_joined(job.scenario, job.folder, progress=progress, argv=argv)
        yield _show(job, result)


def _show(job: _Job, result: RunResult | ExitCode) -> ExitCode:
    """Print what a run brought; the exit code is that of its verdict, or worse when it should have been the same.

    A run that has an exit code alone has told why already.
    """
    if isinstance(result, ExitCode):
        return result
    from eplbctl.render import run as render
    from moe_eplb.analysis import run_folder, stages

    folder = run_folder.load(result.folder)
    Destination(None).write(render.result_text(job.scenario, result, stages.make_report(folder)))
    codes = [result.exit_code]
    if job.target.finished and not result.verdict.failure:
        codes.append(_show_reproduction(job.target.path, folder))
    say(render.next_commands(result), err=True)
    return worst_exit_code(codes)


def _show_reproduction(path: Path, second: RunFolder) -> ExitCode:
    from eplbctl.render import run as render
    from moe_eplb.analysis import reproduction, run_folder

    compared = reproduction.compare_placements(run_folder.load(path), second)
    Destination(None).write(render.reproduction_text(path, compared))
    return ExitCode.VALID if compared.first_difference is None else ExitCode.INVALID
