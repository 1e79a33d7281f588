"""Judges a run folder: every check of the scenario, the run's metrics, and notes on what was left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.judges import (
    agreement,
    completeness,
    correctness,
    effect,
    generation,
    graphs,
    limits,
    measured,
    order,
)
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.metrics import measure_run
from moe_eplb.analysis.run_folder import RunFolder
from moe_eplb.core.verdict import CheckResult, Status, Verdict

__all__ = ["judge"]

_LOG = logging.getLogger(__name__)

Judge = Callable[[RunFolder], CheckResult]


@dataclass(frozen=True, slots=True)
class _Check:
    """A judge, the runs it applies to, and whether `scenario.checks` can switch it off."""

    name: str
    judge: Judge
    applies: Callable[[RunFolder], bool]
    switchable: bool = True


def _always(folder: RunFolder) -> bool:
    return True


def _model_runs(folder: RunFolder) -> bool:
    return not folder.scripted


def _whole_model(folder: RunFolder) -> bool:
    return folder.scenario.model.part == "whole"


def _replays_graphs(folder: RunFolder) -> bool:
    return folder.scenario.execution == "graph"


def _experts_move(folder: RunFolder) -> bool:
    return folder.moving


def _calls_matter(folder: RunFolder) -> bool:
    return folder.moving or folder.scripted


def _errors_matter(folder: RunFolder) -> bool:
    return folder.scripted or folder.scenario.expect_error is not None


_CHECKS = (
    _Check("run_complete", completeness.run_complete, _always, switchable=False),
    _Check("balancer", completeness.balancer, _always, switchable=False),
    _Check("expected_error", completeness.expected_error, _errors_matter, switchable=False),
    _Check("call_order", order.call_order, _calls_matter),
    _Check("stream_join", order.stream_join, _model_runs),
    _Check("graph_order", graphs.graph_order, _replays_graphs, switchable=False),
    _Check("exactly_once", correctness.exactly_once, _model_runs),
    _Check("attestation", correctness.attestation, _model_runs),
    _Check("equality", correctness.equality, _model_runs),
    _Check("generation", generation.generation, _whole_model),
    _Check("statistics", agreement.statistics, _experts_move),
    _Check("agreement", agreement.agreement, _experts_move),
    _Check("effect", effect.effect, _model_runs),
    _Check("balancedness", measured.balancedness, _experts_move),
    _Check("leaks", completeness.leaks, _always),
)


def judge(folder: Path) -> Verdict:
    """Judge a run from what it left behind.

    Raises:
        TraceError, ScenarioError: the folder cannot be read. A judge that fails is no error but an unknown check.
    """
    loaded = run_folder.load(folder)
    measures, notes = _measures(loaded)
    checks = [_run(check, loaded) for check in _CHECKS if _wanted(check, loaded)]
    for threshold in loaded.scenario.checks.parsed_thresholds():
        checks.append(limits.judge_threshold(threshold, measures))
    return Verdict(
        scenario=loaded.scenario.name or folder.name,
        checks=tuple(checks),
        metrics=measures.single,
        notes=(*_notes(loaded), *notes),
        failure=_failure(loaded),
    )


def _wanted(check: _Check, folder: RunFolder) -> bool:
    return check.applies(folder) and not _switched_off(check, folder)


def _switched_off(check: _Check, folder: RunFolder) -> bool:
    return check.switchable and not getattr(folder.scenario.checks, check.name)


def _run(check: _Check, folder: RunFolder) -> CheckResult:
    try:
        return check.judge(folder)
    except Exception as error:  # whatever is wrong with the evidence or the judge, this one check is not proved
        _LOG.error("the check %s could not be judged: %s", check.name, _named(error), exc_info=_verbose())
        where = str(folder.path)
        return CheckResult(check.name, Status.UNKNOWN, "not judged", "a judged check", _named(error), where)


def _measures(folder: RunFolder) -> tuple[Measures, list[str]]:
    try:
        return measure_run(folder), []
    except Exception as error:  # thresholds then have no value and are unknown
        _LOG.error("the metrics could not be computed: %s", _named(error), exc_info=_verbose())
        return Measures(), [f"no metrics: {_named(error)}"]


def _verbose() -> bool:
    """Tracebacks only for who asks: damaged evidence is more often the cause than a bug of a judge."""
    return _LOG.isEnabledFor(logging.DEBUG)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _notes(folder: RunFolder) -> Iterator[str]:
    reason = folder.scenario.balancer_off_reason()
    if reason is not None:
        yield f"balancer: off, because {reason}"
    if _waits_inside_graphs(folder):
        yield (
            "balancer.commit_delay 1 in graphs: the GPU waits inside of replays for plans of the first layer that are "
            "made meanwhile; use 2 or more"
        )
    for check in _CHECKS:
        if check.applies(folder) and _switched_off(check, folder):
            yield f"check {check.name} is switched off in the scenario"
        elif not check.applies(folder) and check.switchable:
            yield f"check {check.name} does not apply: {_why_not(check, folder)}"
    if folder.trace is not None:
        costs = [state.overhead_ns for state in folder.trace.ranks.values() if state.overhead_ns is not None]
        if costs:
            records = len(folder.trace.records)
            yield f"recording cost {max(costs):.0f} ns a record on the slowest rank, {records} records"


def _waits_inside_graphs(folder: RunFolder) -> bool:
    balancer = folder.scenario.balancer
    return folder.moving and _replays_graphs(folder) and balancer is not None and balancer.commit_delay == 1


def _why_not(check: _Check, folder: RunFolder) -> str:
    if check.applies is _whole_model:
        return "the scenario runs no whole model"
    return "the run is a list of calls" if folder.scripted else "no expert moves in this run"


def _failure(folder: RunFolder) -> str:
    state = folder.meta.get("state")
    if state == "finished":
        return ""
    return folder.meta.get("failure") or f"the run did not finish (state {state!r})"
