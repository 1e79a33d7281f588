"""Everything that a report on a capture says, as plain data; rendering it is the command line's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, ROLES, Capture
from moe_eplb.analysis.collective_rows import CollectiveRow, collective_rows
from moe_eplb.analysis.critical_path import iteration_paths
from moe_eplb.analysis.exposed import Stretch, largest_exposed
from moe_eplb.analysis.grouping import distinct_rows, known_numbers, members
from moe_eplb.analysis.idle import Cause, gpu_idle
from moe_eplb.analysis.intervals import intervals, length, union
from moe_eplb.analysis.overlap import PAIRS, Hidden, Overlap, measure
from moe_eplb.analysis.roles import RoleTime, unknown_names
from moe_eplb.analysis.selection import EVERYTHING, Selection
from moe_eplb.analysis.stall import main_stall
from moe_eplb.analysis.stream_pairs import StreamPair, stream_pairs
from moe_eplb.analysis.work import Work, work_of_capture
from moe_eplb.core.events import Role
from moe_eplb.core.verdict import CheckResult

__all__ = ["IdleRow", "PairReport", "PathRow", "RoleRow", "StallRow", "TraceReport", "make_trace_report"]


@dataclass(frozen=True, slots=True)
class RoleRow:
    """All GPU events of a role: their lengths added up, and the time in which at least one of them ran, in ns."""

    role: Role
    events: int
    total_ns: int
    busy_ns: int


@dataclass(frozen=True)
class PairReport:
    """One pair of `moe_eplb.analysis.overlap`, whole and in parts.

    Attributes:
        whole: The selected work, summed over ranks.
        ranks, iterations, layers: The same by rank, iteration and layer; -1 where the trace does not say.
        streams: By rank and number of the stream that B ran on.
        updates, steady: In iterations in which experts moved, and in the others; without work of no iteration.
        worst: The largest exposed ns of any rank in each iteration.
        known: Whether all that may hide was seen: not where graph replays were traced as a whole. Then all else is 0.
    """

    name: str
    whole: Hidden
    ranks: dict[int, Hidden]
    iterations: dict[int, Hidden]
    layers: dict[int, Hidden]
    streams: dict[tuple[int, int], Hidden]
    updates: Hidden
    steady: Hidden
    worst: dict[int, int]
    known: bool = True


@dataclass(frozen=True, slots=True)
class IdleRow:
    """Idle time of a GPU in ns by cause; it and its span are those of the selected iterations if some are selected."""

    rank: int
    device: int
    span_ns: int
    idle_ns: int
    causes: dict[Cause, int]


@dataclass(frozen=True, slots=True)
class PathRow:
    """Critical paths of the selected iterations together: ns of each role, the host, latency.

    `steps` is the slowest rank's ns of each iteration. `waits_known` is false where not every wait between
    streams left a record, so that the path may have missed them.
    """

    steps: dict[int, int]
    length_ns: int
    by_what: dict[str, int]
    balancer_share: float | None
    waits_known: bool


@dataclass(frozen=True, slots=True)
class StallRow:
    """Time that the main streams stood still for the balancer, in ns, and the worst rank's in each iteration."""

    idle_ns: int
    spin_ns: int
    worst: dict[int, int]


@dataclass(frozen=True)
class TraceReport:
    """What a report says.

    Attributes:
        ranks: Those of the trace that were asked for, with or without selected GPU events.
        gpus: How many GPUs have selected events.
        iterations, layers: Numbers that the selected GPU events have, without -1.
        selection: What was asked for, empty for everything.
        unknown: GPU events that no rule knows, longest first.
        update_iterations: Iterations in which experts moved.
        stall: None where the source does not record every wait between streams.
        path: None where no event belongs to an iteration.
        all_layers: Whether no layers were selected. Idle time, stalls and paths are of all of them anyway.
        checks: The order checks, empty when they were not asked for.
    """

    source: str
    form: str
    ranks: tuple[int, ...]
    rank_source: str
    gpus: int
    events: int
    span_ns: int
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    selection: str
    incomplete: str
    notes: tuple[str, ...]
    stream_names: dict[tuple[int, int], str]
    roles: tuple[RoleRow, ...]
    unknown: tuple[RoleTime, ...]
    pairs: dict[str, PairReport]
    update_iterations: tuple[int, ...]
    streams: tuple[StreamPair, ...]
    exposed: tuple[Stretch, ...]
    idle: tuple[IdleRow, ...]
    path: PathRow | None
    stall: StallRow | None
    collectives: tuple[CollectiveRow, ...]
    unmatched_collectives: int
    checks: tuple[CheckResult, ...] = ()
    all_layers: bool = True


def make_trace_report(
    capture: Capture, selection: Selection = EVERYTHING, checks: Sequence[CheckResult] = (), most_exposed: int = 10
) -> TraceReport:
    """The report on a capture that `moe_eplb.analysis.roles.prepare` has been through.

    Work is reported if it is selected; what it hides behind is always everything. Paths, idle time and stalls know
    ranks and iterations and are not selected by layer.

    Args:
        checks: The order checks of the capture, to stand in the report.
        most_exposed: How many of the longest exposed stretches to list.
    """
    gpu = capture.gpu
    only = selection.mask(gpu["rank"], gpu["iteration"], gpu["layer"])
    chosen = replace(capture, gpu=gpu[only])
    work = work_of_capture(capture)
    moved = _update_iterations(chosen)
    alone = _of_ranks(capture, selection)
    ranks = np.unique(alone.gpu["rank"]).tolist()
    collectives, unmatched = collective_rows(chosen, ranks)
    return TraceReport(
        source=capture.source, form=capture.form, ranks=tuple(r for r in capture.ranks if selection.has_rank(r)),
        rank_source=capture.rank_source, events=int(only.sum()),
        gpus=len(distinct_rows([chosen.gpu["rank"], chosen.gpu["device"]])[0]),
        span_ns=int(chosen.gpu["end"].max() - chosen.gpu["start"].min()) if len(chosen.gpu) else 0,
        iterations=known_numbers(chosen.gpu["iteration"]), layers=known_numbers(chosen.gpu["layer"]),
        selection=str(selection), incomplete=capture.incomplete, notes=(*capture.notes, *_absent(ranks, chosen)),
        stream_names=_stream_names(capture),
        roles=_role_rows(chosen), unknown=tuple(unknown_names(chosen, chosen.gpu["role"])),
        pairs=_pairs(work, selection, moved), update_iterations=moved, streams=stream_pairs(chosen),
        exposed=tuple(largest_exposed(capture, PAIRS["balancer"], most_exposed, only)),
        idle=_idle_rows(capture, selection), path=_path(alone, selection), stall=_stall(alone, selection),
        collectives=collectives, unmatched_collectives=unmatched, checks=tuple(checks),
        all_layers=selection.layers is None,
    )  # fmt: skip


def _of_ranks(capture: Capture, selection: Selection) -> Capture:
    """A capture without the ranks that are not asked for, since what is unknown of those is not of the others."""
    if selection.ranks is None:
        return capture
    ranks = [rank for rank in capture.ranks if selection.has_rank(rank)]
    gpu, syncs = (table[np.isin(table["rank"], ranks)] for table in (capture.gpu, capture.syncs))
    return replace(capture, gpu=gpu, syncs=syncs)


def _absent(ranks: Sequence[int], chosen: Capture) -> tuple[str, ...]:
    """Which of the ranks that are asked for have nothing of the selection, and so no part in its figures."""
    there = set(np.unique(chosen.gpu["rank"]).tolist())
    missing = [str(rank) for rank in ranks if rank not in there]
    noun = "rank" if len(missing) == 1 else "ranks"
    return (f"{noun} {', '.join(missing)}: no device event of the selection",) if missing else ()


def _stream_names(capture: Capture) -> dict[tuple[int, int], str]:
    return {(rank, stream): name for (rank, _, stream), name in sorted(capture.streams.items())}


def _update_iterations(capture: Capture) -> tuple[int, ...]:
    return known_numbers(capture.gpu["iteration"][capture.gpu["role"] == ROLE_CODE[Role.EPLB_MIGRATE]])


def _role_rows(capture: Capture) -> tuple[RoleRow, ...]:
    """By role, longest first. Time is a union on each GPU, added up over GPUs."""
    gpu = capture.gpu
    rows = []
    for code, role in enumerate(ROLES):
        mine = gpu[gpu["role"] == code]
        if len(mine):
            total = int((mine["end"] - mine["start"]).sum())
            busy = sum(length(union(intervals(g["start"], g["end"]))) for g in _by_gpu(mine))
            rows.append(RoleRow(role, len(mine), total, busy))
    return tuple(sorted(rows, key=lambda row: (-row.total_ns, row.role)))


def _by_gpu(gpu: c.Table) -> list[c.Table]:
    keys, group = distinct_rows([gpu["rank"], gpu["device"]])
    return [gpu[rows] for rows in members(group, len(keys))]


def _pairs(work: Work, selection: Selection, moved: tuple[int, ...]) -> dict[str, PairReport]:
    only = selection.mask(work.rank, work.iteration, work.layer)
    known = not any(selection.has_rank(rank) for rank in np.unique(work.rank[work.unseen]).tolist())
    only &= known
    return {name: _pair(name, measure(work, pair, only), moved, known) for name, pair in PAIRS.items()}


def _pair(name: str, overlap: Overlap, moved: tuple[int, ...], known: bool) -> PairReport:
    iterations = overlap.by_iteration()
    worst: dict[int, int] = {}
    for (_, iteration), hidden in overlap.iterations.items():
        worst[iteration] = max(worst.get(iteration, 0), hidden.exposed)
    return PairReport(
        name, overlap.whole, overlap.ranks, iterations, overlap.by_layer(),
        {(key[0], key[1]): hidden for key, hidden in overlap.streams.items()},
        updates=sum((h for i, h in iterations.items() if i in moved), Hidden()),
        steady=sum((h for i, h in iterations.items() if i >= 0 and i not in moved), Hidden()),
        worst=dict(sorted(worst.items())), known=known,
    )  # fmt: skip


def _idle_rows(capture: Capture, selection: Selection) -> tuple[IdleRow, ...]:
    return tuple(IdleRow(o.rank, o.device, o.span, o.idle, o.causes) for o in gpu_idle(capture, selection))


def _path(capture: Capture, selection: Selection) -> PathRow | None:
    paths = {
        (rank, iteration): path
        for (rank, iteration), path in iteration_paths(capture).items()
        if selection.has_rank(rank) and selection.has_iteration(iteration)
    }
    if not paths:
        return None
    sums: dict[str, int] = {}
    steps: dict[int, int] = {}
    for (_, iteration), path in sorted(paths.items()):
        steps[iteration] = max(steps.get(iteration, 0), path.length)
        for what, ns in path.by_what().items():
            sums[what] = sums.get(what, 0) + ns
    total = sum(sums.values())
    balancer = sum(ns for what, ns in sums.items() if what.startswith("eplb_"))
    ordered = dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))
    known = all(path.waits_known for path in paths.values()) and not (capture.gpu["kind"] == c.GRAPH).any()
    return PathRow(dict(sorted(steps.items())), total, ordered, balancer / total if total else None, known)


def _stall(capture: Capture, selection: Selection) -> StallRow | None:
    stall = main_stall(capture)
    if stall is None:
        return None
    idle, spin = (
        {key: ns for key, ns in part.items() if selection.has_rank(key[0]) and selection.has_iteration(key[1])}
        for part in (stall.idle, stall.spin)
    )
    worst: dict[int, int] = {}
    for key in sorted({*idle, *spin}):
        worst[key[1]] = max(worst.get(key[1], 0), idle.get(key, 0) + spin.get(key, 0))
    return StallRow(sum(idle.values()), sum(spin.values()), dict(sorted(worst.items())))
