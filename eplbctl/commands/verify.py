"""``eplbctl verify``: run scenarios, judge them and run folders, and end with the worst verdict."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.folders import new_folder
from eplbctl.options import PATH, Destination, format_option, output_options
from eplbctl.outcome import Outcome, worst_exit_code
from eplbctl.output import require_room, say
from eplbctl.signals import held, released
from eplbctl.targets import Target, load_all, select, targets
from moe_eplb.core.errors import EplbError, ExitCode

if TYPE_CHECKING:
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import RankPool

__all__ = ["command"]


@click.command()
@click.argument("paths", nargs=-1, type=PATH, metavar="[PATH]...")
@click.option("--select", "wanted", multiple=True, metavar="GLOB", help="Only names that match. Repeatable.")
@click.option("--exclude", "unwanted", multiple=True, metavar="GLOB", help="No names that match. Repeatable.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first one that is not valid.")
@click.option("--keep", type=PATH, metavar="DIR", help="Keep the run folders in this folder.")
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
    with held(), _folder(keep) as parent, _pool(bool(scenarios)) as pool, released():
        for target in chosen:
            outcome = _outcome(pool, target, scenarios.get(target), parent, keep is not None, argv)
            outcomes.append(outcome)
            say(f"[{len(outcomes)}/{len(chosen)}] {outcome.name}: {outcome.word} ({outcome.seconds:.1f} s)", err=True)
            if fail_fast and outcome.exit_code != ExitCode.VALID:
                break
    destination.write(_render(form, outcomes, len(chosen) - len(outcomes)))
    return worst_exit_code(outcome.exit_code for outcome in outcomes)


def _folder(keep: Path | None) -> AbstractContextManager[Path]:
    """Where the run folders are: a folder that stays, or one that goes with them."""
    if keep is None:
        return _temporary_folder()
    require_room(keep)
    return contextlib.nullcontext(keep)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="eplbctl-verify-") as folder:
        yield Path(folder)


def _pool(needed: bool) -> AbstractContextManager[RankPool | None]:
    if not needed:
        return contextlib.nullcontext()
    from moe_eplb.session import RankPool

    return RankPool()


def _outcome(
    pool: RankPool | None, target: Target, scenario: Scenario | None, parent: Path, kept: bool, argv: Sequence[str]
) -> Outcome:
    started = time.monotonic()
    try:
        if pool is None or scenario is None:
            return _judge(target, started)
        return _run(pool, target, scenario, parent, kept, argv)
    except EplbError as error:
        return Outcome.of_error(target.name, target.path, error, time.monotonic() - started)


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
