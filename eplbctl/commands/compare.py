"""``eplbctl compare``: whether a trace got worse than another of the same work, beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, FiniteRange, format_option, output_options, trace_options
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from moe_eplb.analysis.compare import Compared
    from moe_eplb.analysis.report import Question
    from moe_eplb.core.verdict import CheckResult

__all__ = ["command"]


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@trace_options
@click.option(
    "--tolerance", type=FiniteRange(0, 1000), default=5.0, show_default=True, help="Percent that do not count."
)
@click.option("--floor-us", type=FiniteRange(0), default=1.0, show_default=True, help="us that do not count.")
@click.option(
    "--min-iterations", type=click.IntRange(2), default=10, show_default=True, help="Pairs that must be there."
)
@click.option("--gate", "gates", multiple=True, metavar="METRIC", help="Judge only this metric. Repeatable.")
@format_option("text", "json", "markdown", "junit", "github")
@output_options
def command(
    first: Path, second: Path, question: Question, tolerance: float, floor_us: float, min_iterations: int,
    gates: tuple[str, ...], form: str, destination: Destination,
) -> ExitCode:  # fmt: skip
    """Compare SECOND with FIRST, iteration by iteration and layer by layer.

    Both are run folders or traces as `eplbctl report` takes them; several files of one job go through
    `eplbctl trace merge` first. A metric is worse if the whole 95 % interval of its median difference lies beyond the
    tolerance. The exit code is 1 if a metric is worse, 3 if there are too few iterations in common.

    \b
    Examples:
      eplbctl compare runs/last-week runs/today
      eplbctl compare before.sqlite after.sqlite --iterations 10- --gate step --gate exposed --format markdown
    """
    from moe_eplb.analysis.compare import METRICS, Tolerance, compare_reports
    from moe_eplb.analysis.report import make_report

    for gate in gates:
        if gate not in METRICS:
            raise UsageError("E082", f"there is no metric {gate!r} to compare", hint=f"one of {', '.join(METRICS)}")
    before, after = (make_report([path], question) for path in (first, second))
    allowed = Tolerance(tolerance / 100, floor_us, min_iterations)
    compared, checks = compare_reports(before, after, allowed, gates or tuple(METRICS))
    destination.write(_render(form, (str(first), str(second)), compared, checks))
    return _exit_code(checks)


def _exit_code(checks: Sequence[CheckResult]) -> ExitCode:
    statuses = {check.status.value for check in checks}
    if "invalid" in statuses:
        return ExitCode.INVALID
    return ExitCode.UNKNOWN if not checks or "unknown" in statuses else ExitCode.VALID


def _render(form: str, names: tuple[str, str], compared: Sequence[Compared], checks: Sequence[CheckResult]) -> str:
    from eplbctl.render import compared as render

    if form == "text":
        return render.text(names, compared)
    if form == "markdown":
        return render.markdown(names, compared)
    if form == "json":
        return render.json_text(names, compared, checks)
    return _for_ci(form, names, checks)


def _for_ci(form: str, names: tuple[str, str], checks: Sequence[CheckResult]) -> str:
    from eplbctl.outcome import Outcome
    from eplbctl.render import machine
    from moe_eplb.core.verdict import Verdict

    verdict = Verdict(" -> ".join(names), tuple(checks))
    outcome = Outcome(verdict.scenario, Path(names[1]), verdict, 0.0, verdict.exit_code)
    if form == "junit":
        return machine.junit([outcome], by="eplbctl compare")
    return machine.github([outcome], by="eplbctl compare", noun="comparisons")
