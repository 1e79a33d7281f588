"""``eplbctl verify``: run scenarios, judge them and run folders, and end with the worst verdict."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.folders import new_folder
from eplbctl.options import Destination, format_option, output_options
from eplbctl.outcome import Outcome, worst_exit_code
from eplbctl.output import say
from eplbctl.targets import Target, load_all, select, targets
from moe_eplb.core.errors import EplbError, ExitCode

if TYPE_CHECKING:
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import RankPool

__all__ = ["command"]


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[PATH]...")
@click.option("--select", "wanted", multiple=True, metavar="GLOB", help="Only names that match. Repeatable.")
@click.option("--exclude", "unwanted", multiple=True, metavar="GLOB", help="No names that match. Repeatable.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first one that is not valid.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the run folders in this folder.")
@format_option("text", "json", "junit", "github")
@output_options
@click.pass_obj
def command(
    argv: Sequence[str], paths: tuple[Path, ...], wanted: tuple[str, ...], unwanted: tuple[str, ...],
    fail_fast: bool, keep: Path | None, form: str, destination: Destination,
) -> ExitCode:  # fmt: skip
    """Run scenarios and judge them; judge run folders again without running them.

    PATH is a scenario file, a run folder, or a folder that is searched for both, apart from folders called data; the
    default is scenarios/.
    The exit code is that of the most severe outcome: failed 4, bad input 2, invalid 1, unknown 3, valid 0, in this
    order. Nothing selected is exit code 2.

    \b
    Examples:
      eplbctl verify
      eplbctl verify scenarios/ --select 'drift*' --fail-fast
      eplbctl verify scenarios/ --format junit -o verify.xml
      eplbctl verify runs/quickstart-20260102T030405Z
    """
    chosen = select(targets(paths or (Path("scenarios"),)), wanted, unwanted)
    # Run folders are loaded by the judge; a scenario that does not load must stop us before the first one runs.
    scenarios = dict(
        zip([t for t in chosen if not t.finished], load_all([t for t in chosen if not t.finished]), strict=True)
    )
    outcomes: list[Outcome] = []
    for outcome in _outcomes(chosen, scenarios, keep, argv):
        outcomes.append(outcome)
        say(f"[{len(outcomes)}/{len(chosen)}] {outcome.name}: {outcome.word} ({outcome.seconds:.1f} s)", err=True)
        if fail_fast and outcome.exit_code != ExitCode.VALID:
            break
    destination.write(_render(form, outcomes, len(chosen) - len(outcomes)))
    return worst_exit_code(outcome.exit_code for outcome in outcomes)


def _outcomes(
    chosen: Sequence[Target], scenarios: dict[Target, Scenario], keep: Path | None, argv: Sequence[str]
) -> Iterator[Outcome]:
    """One outcome after another, all from one pool of ranks."""
    with contextlib.ExitStack() as stack:
        kept = keep is not None
        parent = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eplbctl-verify-")))
        pool = stack.enter_context(_pool()) if scenarios else None
        for target in chosen:
            started = time.monotonic()
            try:
                if target.finished or pool is None:
                    yield _judge(target, started)
                else:
                    yield _run(pool, target, scenarios[target], parent, kept, argv)
            except EplbError as error:
                yield Outcome.of_error(target.name, target.path, error, time.monotonic() - started)


def _pool() -> RankPool:
    from moe_eplb.session import RankPool

    return RankPool()


def _judge(target: Target, started: float) -> Outcome:
    from moe_eplb.analysis.verdict import judge

    verdict = judge(target.path)
    return Outcome(target.name, target.path, verdict, time.monotonic() - started, verdict.exit_code, folder=target.path)


def _run(pool: RankPool, target: Target, scenario: Scenario, parent: Path, kept: bool, argv: Sequence[str]) -> Outcome:
    folder = new_folder(parent, scenario.name)
    result = pool.run(scenario, folder, argv=argv)
    where = folder if kept else None
    return Outcome(target.name, target.path, result.verdict, result.seconds, result.exit_code, folder=where)


def _render(form: str, outcomes: Sequence[Outcome], not_run: int) -> str:
    from eplbctl.render import machine, text

    if form == "json":
        return machine.json_text(outcomes, not_run=not_run)
    if form == "junit":
        return machine.junit(outcomes)
    if form == "github":
        return machine.github(outcomes)
    return text.summary(outcomes, not_run=not_run)
