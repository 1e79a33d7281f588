"""Were counts summed over the ranks as often as the scenario says, and each sum made of all that it is to hold.

A sum belongs to the layer that makes it: each layer its own, or with one reduction an iteration the last one that of
all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.judges.spans import Span, Stage, spans
from moe_eplb.analysis.run_folder import Place, RunFolder
from moe_eplb.analysis.trace import Trace
from moe_eplb.core.events import ROUTE_COUNTS, Kind

__all__ = ["judge_reductions"]

_SUMS = (Kind.VOTE, Kind.STATISTIC_REDUCE)
"""The vote takes the counts along, where one is made before the sum."""


def judge_reductions(folder: RunFolder, trace: Trace, findings: Findings) -> None:
    """Judge the sums that the balancer makes by itself: those of statistics path "local_ids" over several ranks."""
    scenario = folder.scenario
    if not folder.moving or len(folder.ranks) == 1 or scenario.statistics_path != "local_ids":
        return
    device = trace.records.device
    reduced = spans(device.kinds(Kind.STATISTIC_REDUCE))
    carried, counted = spans(device.kinds(*_SUMS)), _counted(trace)
    for place in folder.places:
        for rank in folder.ranks:
            stage, summed = Stage(rank, place.layer, place.iteration), _summed(folder, place.layer)
            _judge_number(folder, trace, stage, bool(summed), stage in reduced, findings)
            if stage in reduced:
                _judge_contents(stage, carried[stage], summed, counted, findings)


def _summed(folder: RunFolder, layer: int) -> range:
    """The layers whose counts are in the sum that a layer makes."""
    assert folder.scenario.balancer is not None
    layers = folder.scenario.model.layers
    if folder.scenario.balancer.reduction == "layer":
        return range(layer, layer + 1)
    return range(layers) if layer == layers - 1 else range(0)


def _counted(trace: Trace) -> dict[Stage, Span]:
    """When each stage counted: by itself, or where it routed."""
    device = trace.records.device
    counted = spans(device.kinds(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS))
    routes = device.kinds(Kind.ROUTE)
    for stage, span in spans(routes.where((routes.a & ROUTE_COUNTS) > 0)).items():
        other = counted.get(stage, span)
        counted[stage] = Span(min(span.start, other.start), max(span.end, other.end))
    return counted


def _judge_number(
    folder: RunFolder, trace: Trace, stage: Stage, wanted: bool, found: bool, findings: Findings
) -> None:  # fmt: skip
    where = f"rank {stage.rank}, {Place(stage.layer, stage.iteration)}"
    if found and not wanted:
        findings.wrong("a sum over the ranks that the last layer's one holds already", where)
    elif wanted and not found:
        state = trace.ranks.get(stage.rank)
        sure = state is not None and state.complete and not folder.failed
        (findings.wrong if sure else findings.missing)("no sum of statistics over the ranks", where)


def _judge_contents(
    stage: Stage, carried: Span, summed: range, counted: Mapping[Stage, Span], findings: Findings
) -> None:  # fmt: skip
    for layer in summed:
        count = counted.get(stage._replace(layer=layer))
        where = f"rank {stage.rank}, {Place(layer, stage.iteration)}"
        if count is None:
            findings.missing("no record of what counted", where)
        elif count.end > carried.start:
            findings.wrong(f"the sum over the ranks began {count.end - carried.start} ns before counts ended", where)
