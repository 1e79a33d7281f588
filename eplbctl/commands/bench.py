"""``eplbctl bench``: the step time of variants of a scenario, measured in turns in the same processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eplbctl.options import PATH, Destination, format_option, output_options, overrides_option
from eplbctl.progress import Progress
from eplbctl.signals import held, released
from eplbctl.targets import load_all, select, targets
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from moe_eplb.core.samples import Compared
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import Timing

__all__ = ["command"]

_COUNT = click.IntRange(1, 1_000_000)


@click.command()
@click.argument("scenario", type=PATH)
@click.option("--compare", required=True, metavar="KEY=A,B,...", help="The values of one key that are compared.")
@click.option("--rounds", type=_COUNT, default=10, show_default=True, help="Turns that each variant takes.")
@click.option("--steps", type=_COUNT, default=20, show_default=True, help="Iterations of a turn that are timed.")
@click.option("--warm-up", type=click.IntRange(0, 1_000_000), default=3, show_default=True, help="Iterations before.")
@overrides_option
@format_option("text", "json")
@output_options
@click.pass_obj
def command(
    argv: Sequence[str], scenario: Path, compare: str, rounds: int, steps: int, warm_up: int,
    overrides: tuple[str, ...], form: str, destination: Destination,
) -> ExitCode:  # fmt: skip
    """Time variants of SCENARIO against each other.

    All variants live in the same ranks and take turns, forward and backward (A B B A ...). A step's time is that of its
    slowest rank, without checks and records. The ratio is to the first variant, with the 95 % interval over rounds; of
    three variants or more each is held against the one before it, too. The path of the statistics is that of each
    variant: with `statistics: auto`, overlap=before counts the ids of all ranks, for which it needs dispatch allgather.

    \b
    Examples:
      eplbctl bench scenarios/dynamic.yaml --compare overlap=serial,after
      eplbctl bench scenarios/overlap_before.yaml --compare overlap=serial,before,after
      eplbctl bench scenarios/dynamic.yaml --compare balancer.state=host,device --format json -o bench.json
    """
    import tempfile

    from moe_eplb.core.samples import compare as compared_of
    from moe_eplb.session import Timing
    from moe_eplb.session.samples import read_samples

    names, variants = _variants(scenario, compare, overrides)
    timing = Timing(rounds, steps, warm_up)
    with tempfile.TemporaryDirectory(prefix="eplbctl-bench-") as folder:
        _run(variants, timing, Path(folder))
        samples, device = read_samples(Path(folder), variants[0].ranks)
    compared = compared_of(samples)
    if form == "text":
        destination.write(_text(variants, names, compared, device))
    else:
        destination.write(json.dumps(_document(argv, variants, timing, names, compared, device, samples), indent=1))
    return ExitCode.VALID


def _variants(path: Path, compare: str, overrides: Sequence[str]) -> tuple[list[str], list[Scenario]]:
    key, equals, values = compare.partition("=")
    names = [value.strip() for value in values.split(",")]
    if not equals or not key.strip() or len(names) < 2 or "" in names:
        raise UsageError(
            "E069", f"--compare {compare!r} does not parse", why="it needs one key and two values or more",
            hint="such as --compare overlap=serial,after",
        )  # fmt: skip
    target = select(targets((path,)), (), ())
    if len(target) != 1:
        raise UsageError("E069", "one scenario is compared with its variants", why=f"{path} holds {len(target)}")
    variants = [load_all(target, [*overrides, f"{key.strip()}={name}"])[0] for name in names]
    _require_comparable(variants)
    return [f"{key.strip()}={name}" for name in names], variants


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


def _statistics(scenario: Scenario) -> str:
    return "none" if scenario.balancer_off_reason() else scenario.statistics_path


def _range(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _text(
    variants: Sequence[Scenario], names: Sequence[str], compared: Sequence[Compared], device: dict[str, Any]
) -> str:
    from eplbctl.render.text import table

    heads = ["variant", "statistics", "steps", "median ms", "p99 ms", "ratio", "95 % of ratio"]
    rows = [
        [
            name,
            _statistics(variant),
            c.steps,
            *(f"{x:.3f}" for x in (c.median_ms, c.p99_ms, c.ratio)),
            _range(c.low, c.high),
        ]
        for name, variant, c in zip(names, variants, compared, strict=True)
    ]
    if len(variants) > 2:
        heads += ["to the one before", "95 % of that"]
        for row, c in zip(rows, compared, strict=True):
            row += [f"{c.step_ratio:.3f}", _range(c.step_low, c.step_high)]
    where, scenario = device.get("gpu", device["kind"]), variants[0]
    return f"{scenario.name}: {scenario.ranks} ranks, {where}, {scenario.execution}\n\n{table(heads, rows)}"


def _document(
    argv: Sequence[str], variants: Sequence[Scenario], timing: Timing, names: Sequence[str],
    compared: Sequence[Compared], device: dict[str, Any], samples: Sequence[Sequence[Sequence[float]]],
) -> dict[str, Any]:  # fmt: skip
    from moe_eplb.session.folder import versions

    scenario = variants[0]
    found = [
        {
            "variant": name,
            "statistics": _statistics(variant),
            "execution": variant.execution,
            "dispatch": variant.dispatch,
        }
        | {**asdict(c), "samples_ms": rounds}
        for name, variant, c, rounds in zip(names, variants, compared, samples, strict=True)
    ]
    return {
        "scenario": scenario.name, "ranks": scenario.ranks, "seed": scenario.seed, "command": " ".join(argv),
        "device": device, "versions": versions(), **timing._asdict(), "variants": found,
    }  # fmt: skip
