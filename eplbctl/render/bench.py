"""What `eplbctl bench` shows: the step times of variants, how they compare, and what balancing gains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eplbctl.render.text import table
from moe_eplb.core.samples import LEAST_COST

if TYPE_CHECKING:
    from moe_eplb.core.samples import Compared, Gain
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import Timing

__all__ = ["document", "text"]


def _statistics(scenario: Scenario) -> str:
    return "none" if scenario.balancer_off_reason() else scenario.statistics_path


def _range(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def text(
    variants: Sequence[Scenario], names: Sequence[str], compared: Sequence[Compared], device: dict[str, Any],
    gained: Gain | None = None,
) -> str:  # fmt: skip
    """A table with a row for each variant, and what was gained."""
    heads = ["variant", "statistics", "steps", "median ms", "p99 ms", "ratio", "95 % of ratio"]
    rows = [
        [name, _statistics(variant), c.steps, *(f"{x:.3f}" for x in (c.median_ms, c.p99_ms, c.ratio)),
         _range(c.low, c.high)]
        for name, variant, c in zip(names, variants, compared, strict=True)
    ]  # fmt: skip
    if len(variants) > 2:
        heads += ["to the one before", "95 % of that"]
        for row, c in zip(rows, compared, strict=True):
            row += [f"{c.step_ratio:.3f}", _range(c.step_low, c.step_high)]
    where, scenario = device.get("gpu", device["kind"]), variants[0]
    found = f"{scenario.name}: {scenario.ranks} ranks, {where}, {scenario.execution}\n\n{table(heads, rows)}"
    return found if gained is None else f"{found}\n\n{_gained(gained)}"


def _gained(gain: Gain) -> str:
    times = f"static {gain.static_ms:.1f} ms, dynamic {gain.dynamic_ms:.1f} ms, balanced {gain.balanced_ms:.1f} ms"
    if not gain.tells:
        return (
            f"gain: unknown, since imbalance costs too little here: static / balanced = {gain.cost:.3f}, at least "
            f"{LEAST_COST} is needed ({times})"
        )
    return (
        f"gain: {gain.share:.3f} of the time that imbalance costs, 95 % {_range(gain.low, gain.high)} ({times}, "
        f"static / balanced = {gain.cost:.3f})"
    )


def document(
    argv: Sequence[str], variants: Sequence[Scenario], timing: Timing, names: Sequence[str],
    compared: Sequence[Compared], device: dict[str, Any], samples: Sequence[Sequence[Sequence[float]]],
    gained: Gain | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same with every sample, and what it was measured on."""
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
        "gain": None if gained is None else _finite(asdict(gained)) | {"tells": gained.tells},
    }  # fmt: skip


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no other numbers."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
