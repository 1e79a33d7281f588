"""``eplbctl bench``: the step time of variants of a scenario, measured in turns in the same processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, format_option, output_options, overrides_option
from eplbctl.progress import Progress
from eplbctl.signals import held, released
from eplbctl.targets import load_all, select, targets
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from eplbctl.targets import Target
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import Timing

__all__ = ["command"]

_COUNT = click.IntRange(1, 1_000_000)
_REHEARSAL = 3
_NOT_UNIFORM = {
    "uniform": "it is uniform itself", "model": "its router chooses", "recorded": "its tokens are recorded",
    "burst": "its tokens would be others",
}  # fmt: skip
_TOKENS = ("tokens_per_rank", "steps", "prompt_tokens", "ragged")
"""What of a workload says how many tokens there are."""


@click.command()
@click.argument("scenario", type=PATH)
@click.option("--compare", metavar="KEY=A,B,...", help="The values of one key that are compared.")
@click.option("--gain", is_flag=True, help="How much of the time that imbalance costs the balancer wins back.")
@click.option("--rounds", type=_COUNT, default=10, show_default=True, help="Turns that each variant takes.")
@click.option("--steps", type=_COUNT, default=20, show_default=True, help="Iterations of a turn that are timed.")
@click.option("--warm-up", type=click.IntRange(0, 1_000_000), help="Iterations before.  [default: 3, with --gain 0]")
@overrides_option
@format_option("text", "json")
@output_options
@click.pass_obj
def command(
    argv: Sequence[str], scenario: Path, compare: str | None, gain: bool, rounds: int, steps: int,
    warm_up: int | None, overrides: tuple[str, ...], form: str, destination: Destination,
) -> ExitCode:  # fmt: skip
    """Time variants of SCENARIO against each other.

    All variants live in the same ranks and take turns, forward and backward (A B B A ...). A step's time is that of its
    slowest rank, without checks and records. The ratio is to the first variant, with the 95 % interval over rounds; of
    three variants or more each is held against the one before it, too. The path of the statistics is that of each
    variant: with `statistics: auto`, overlap=before counts the ids of all ranks, for which it needs dispatch allgather.

    --gain compares the scenario with the same one without moves, and that with uniform routing. The clock runs from the
    first iteration on, with plans, moves and the balancer's warm-up in it; kernels are loaded before. Where static
    placements take less than 1.3 of the time of uniform routing, the gain is unknown.

    \b
    Examples:
      eplbctl bench scenarios/dynamic.yaml --compare overlap=serial,after
      eplbctl bench scenarios/overlap_before.yaml --compare overlap=serial,before,after
      eplbctl bench scenarios/dynamic.yaml --compare balancer.state=host,device --format json -o bench.json
      eplbctl bench scenarios/workloads/w2_hot_rank.yaml --gain
    """
    import tempfile

    from eplbctl.render import bench as render
    from moe_eplb.core.samples import compare as compared_of
    from moe_eplb.core.samples import gain as gain_of
    from moe_eplb.session import Timing
    from moe_eplb.session.samples import read_samples

    if gain == (compare is not None):
        raise UsageError("E069", "give either --compare or --gain", hint="such as --compare overlap=serial,after")
    names, variants = _variants(scenario, compare, overrides) if compare else _for_gain(scenario, overrides)
    before = warm_up if warm_up is not None else 0 if gain else 3
    timing = Timing(rounds, steps, before, rehearsal=_REHEARSAL if gain else 0)
    with tempfile.TemporaryDirectory(prefix="eplbctl-bench-") as folder:
        _run(variants, timing, Path(folder))
        samples, device = read_samples(Path(folder), variants[0].ranks)
    compared, gained = compared_of(samples), gain_of(samples) if gain else None
    if form == "text":
        destination.write(render.text(variants, names, compared, device, gained))
    else:
        found = render.document(argv, variants, timing, names, compared, device, samples, gained)
        destination.write(json.dumps(found, indent=1))
    return ExitCode.VALID if gained is None or gained.tells else ExitCode.UNKNOWN


def _variants(path: Path, compare: str, overrides: Sequence[str]) -> tuple[list[str], list[Scenario]]:
    key, equals, values = compare.partition("=")
    names = [value.strip() for value in values.split(",")]
    if not equals or not key.strip() or len(names) < 2 or "" in names:
        raise UsageError(
            "E069", f"--compare {compare!r} does not parse", why="it needs one key and two values or more",
            hint="such as --compare overlap=serial,after",
        )  # fmt: skip
    target = _one(path)
    variants = [load_all(target, [*overrides, f"{key.strip()}={name}"])[0] for name in names]
    _require_comparable(variants)
    return [f"{key.strip()}={name}" for name in names], variants


def _for_gain(path: Path, overrides: Sequence[str]) -> tuple[list[str], list[Scenario]]:
    from moe_eplb.core import scenario as scenarios

    target = _one(path)
    moving = load_all(target, list(overrides))[0]
    if moving.balancer_off_reason() is not None or moving.balancer is None:
        why = moving.balancer_off_reason() or "the scenario has no balancer"
        raise UsageError("E069", "there is no gain without moves", why=why, hint="use a scenario whose experts move")
    if moving.workload.kind in _NOT_UNIFORM:
        raise UsageError(
            "E069", f"workload kind {moving.workload.kind!r} cannot be held against uniform routing",
            why=_NOT_UNIFORM[moving.workload.kind], hint="use zipf, hot, hot_rank, rotating, ...",
        )  # fmt: skip
    static = ["balancer.layer_updates_per_iter=0", "checks.thresholds={}"]
    kept = {name: getattr(moving.workload, name) for name in _TOKENS if name in moving.workload.model_fields_set}
    uniform = [*static, f"workload={json.dumps({'kind': 'uniform', **kept})}"]
    # Changes of the loaded scenario and not of the file, in which a balancer file stands for what they change.
    text, name = scenarios.dump(moving), str(target[0].path)
    variants = [scenarios.loads(text, name, static), moving, scenarios.loads(text, name, uniform)]
    _require_comparable(variants)
    return ["static", "dynamic", "balanced"], variants


def _one(path: Path) -> list[Target]:
    target = select(targets((path,)), (), ())
    if len(target) != 1:
        raise UsageError("E069", "one scenario is compared with its variants", why=f"{path} holds {len(target)}")
    return target


def _require_comparable(variants: Sequence[Scenario]) -> None:
    first = variants[0]
    if first.calls is not None or first.model.part == "whole":
        raise UsageError("E069", "only stacks of MoE layers are compared", hint="use a scenario without calls and part")
    if any((v.ranks, v.device) != (first.ranks, first.device) for v in variants):
        raise UsageError("E069", "variants share their ranks and device", hint="compare another key")


def _run(variants: Sequence[Scenario], timing: Timing, folder: Path) -> None:
    from moe_eplb.session import RankPool

    with held(), RankPool() as pool, released():
        with Progress(variants[0].name, "round") as progress:
            pool.compare(variants, timing, folder, progress=progress)
        pool.close()
