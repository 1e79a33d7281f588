"""Did what the joins order wait for each other: by the waits that were asked for, and by the times at which it ran.

For each layer with dynamic routing: route and experts come after the balancer's wait, statistics after the top-k that
gives their ids, the hand-over after every route and experts, the next layer's top-k after the hand-over. Where a
trace does not tell what the experts or the top-k are, the main stream's work at their place stands in for them: if that
has waited, they have; if not, nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, Capture, Table
from moe_eplb.analysis.joins import HappensBefore
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.order_check_work import StageWork
from moe_eplb.analysis.work import main_streams
from moe_eplb.core.events import KINDS, Kind, Role
from moe_eplb.core.verdict import CheckResult

__all__ = ["Pairs", "joins", "ordered_pairs", "times"]

Indices = NDArray[np.int64]
_WAIT = (Kind.START_WAIT_GPU_STAGE, Kind.COMMIT)
_COUNTS = (
    Kind.UPDATE_LOCAL_STATISTIC,
    Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS,
    Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS,
)
_READS = (Kind.ROUTE, Kind.EXPERTS)
_BALANCER = [ROLE_CODE[role] for role in Role if role.startswith("eplb_")]
_COARSE_NS = 1000


@dataclass(frozen=True)
class Pairs:
    """Rows of GPU events [P] of which the first must end before the other begins, and the stage of the second.

    `guessed`: the trace does not say that the events are what they are taken for.
    """

    what: str
    first: Indices
    then: Indices
    stage: Indices
    guessed: bool = False


@dataclass(frozen=True)
class _Picker:
    """Finds the pairs; of each stage and stream the last event of what comes first and the first of what follows."""

    capture: Capture
    work: StageWork
    lane: Indices

    def all(self) -> Iterator[Pairs]:
        waits, reads, hands = self._of(*_WAIT), self._of(*_READS), self._of(Kind.START_SET_CPU_STAGE)
        yield self._within("route and experts after the wait", waits, reads)
        yield self._within("hand-over after route and experts", reads, hands)
        yield self._counts(self._of(Kind.TOPK))
        yield self._next(hands, self._of(Kind.TOPK))
        yield from self._guesses(waits, hands)

    def _of(self, *kinds: Kind) -> Indices:
        rows = self.work.of(*kinds)
        return rows[self.capture.gpu["graph_node"][rows] < 0]

    def _within(self, what: str, first: Indices, then: Indices, *, guessed: bool = False) -> Pairs:
        """Every last of a stage with every first of the same stage."""
        stage = self.work.stage
        ups, downs = self._edge(first, stage[first], last=True), self._edge(then, stage[then], last=False)
        return self._joined(what, ups, stage[ups], downs, stage[downs], guessed=guessed)

    def _counts(self, ids: Indices) -> Pairs:
        """Every count with the top-k that was put on a stream last before it, since chunks have one each."""
        counts = self._of(*_COUNTS)
        counts = counts[np.isin(self.work.stage[counts], np.unique(self.work.stage[ids]))]
        rows = np.concatenate([ids, counts])
        is_count = np.arange(len(rows)) >= len(ids)
        order = np.lexsort((is_count, self.work.launched[rows], self.work.stage[rows]))
        place, stage = np.arange(len(rows)), self.work.stage[rows][order]
        is_id = ~is_count[order]
        # The last top-k so far; before the stage's first one it is that of another stage, and the first one is taken.
        latest = np.maximum.accumulate(np.where(is_id, place, -1))
        following = np.minimum.accumulate(np.where(is_id, place, len(rows))[::-1])[::-1]
        own = (latest >= 0) & (stage[latest] == stage)
        chosen = rows[order][np.where(own, latest, np.minimum(following, len(rows) - 1))]
        then = rows[order][~is_id]
        return Pairs("statistics after the top-k of their ids", chosen[~is_id], then, self.work.stage[then])

    def _next(self, hands: Indices, ids: Indices) -> Pairs:
        """Every hand-over with the top-k of the stage that follows on its rank."""
        stages = self.work.stages
        order = np.lexsort((stages["start"], stages["rank"]))
        follows = np.full(len(stages) + 1, c.UNKNOWN, np.int64)
        same = stages["rank"][order][1:] == stages["rank"][order][:-1]
        follows[order[:-1][same]] = order[1:][same]
        ups = self._edge(hands, self.work.stage[hands], last=True)
        downs = self._edge(ids, self.work.stage[ids], last=False)
        what = "the next top-k after the hand-over"
        return self._joined(what, ups, follows[self.work.stage[ups]], downs, self.work.stage[downs])

    def _guesses(self, waits: Indices, hands: Indices) -> Iterator[Pairs]:
        """The main stream's work in the place of experts, and of the top-k, in stages that tell of none."""
        main, stage, work = self._main, self.work.stage, self.work
        nameless = main[~np.isin(stage[main], np.unique(stage[self._of(Kind.EXPERTS)]))]
        inside = nameless[
            (work.launched[nameless] >= work.holds[stage[nameless]])
            & (work.launched[nameless] < work.releases[stage[nameless]])
        ]
        yield self._within("the main stream's work after the wait", waits, inside, guessed=True)
        yield self._within("hand-over after the main stream's work", inside, hands, guessed=True)
        early = main[~np.isin(stage[main], np.unique(stage[self._of(Kind.TOPK)]))]
        pairs = self._counts(early)
        what = "statistics after the main stream's work before them"
        yield Pairs(what, pairs.first, pairs.then, pairs.stage, guessed=True)

    @cached_property
    def _main(self) -> Indices:
        """Rows of the main streams' events that are not the balancer's."""
        gpu, stage = self.capture.gpu, self.work.stage
        main = np.zeros(len(gpu), np.bool_)
        for (rank, device), stream in main_streams(self.capture).items():
            main |= (gpu["rank"] == rank) & (gpu["device"] == device) & (gpu["stream"] == stream)
        return np.flatnonzero(main & (stage >= 0) & (gpu["graph_node"] < 0) & ~np.isin(gpu["role"], _BALANCER))

    def _edge(self, rows: Indices, stage: Indices, *, last: bool) -> Indices:
        """Of each stage and lane the last or the first of some events, in the order of stages."""
        start = self.capture.gpu["start"][rows]
        order = np.lexsort((start, self.lane[rows], stage))
        keys = stage[order], self.lane[rows][order]
        edge = np.ones(len(rows), np.bool_)
        same = (keys[0][1:] == keys[0][:-1]) & (keys[1][1:] == keys[1][:-1])
        if last:
            edge[:-1] = ~same
        else:
            edge[1:] = ~same
        found: Indices = rows[order[edge]]
        return found

    def _joined(
        self, what: str, ups: Indices, of_ups: Indices, downs: Indices, of_downs: Indices, *, guessed: bool = False
    ) -> Pairs:
        order = np.argsort(of_ups, kind="stable")
        ups, of_ups = ups[order], of_ups[order]
        low, high = np.searchsorted(of_ups, of_downs, "left"), np.searchsorted(of_ups, of_downs, "right")
        counts = np.where(of_downs >= 0, high - low, 0)
        then = np.repeat(np.arange(len(downs)), counts)
        offset = np.arange(len(then)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Pairs(what, ups[low[then] + offset], downs[then], self.work.stage[downs[then]], guessed)


def ordered_pairs(capture: Capture, work: StageWork, order: HappensBefore) -> list[Pairs]:
    """All pairs of GPU events that must run one after the other."""
    return list(_Picker(capture, work, order.lane).all())


def joins(
    capture: Capture, work: StageWork, order: HappensBefore, pairs: list[Pairs], marks: Table, *, ours: bool
) -> CheckResult:
    """Work waits for what it must come after: the waits themselves are there, whatever the times happened to be.

    In our own traces the device says which work did not wait, as it was told it; elsewhere the recorded waits show it.

    Args:
        marks: Work that did not wait, as our device saw it.
    """
    findings = Findings("joins", "every join that the calls promise is a wait between the streams")
    for mark in marks:
        said = capture.names[capture.ranges["category"][mark["row"]]] if _said(capture, mark) else "work did not wait"
        place = f"rank {mark['rank']}, layer {mark['layer']}, iteration {mark['iteration']}"
        findings.wrong(said, place)
    _need_work(capture, work, findings, ours=ours)
    checked = sum(len(one.first) for one in pairs)
    if ours:
        return findings.result(f"{checked} pairs of work; the device noted {len(marks)} that did not wait")
    by_stream = 0
    for one in pairs:
        by_stream += int((order.lane[one.first] == order.lane[one.then]).sum())
        _judge_waits(capture, work, order, one, findings)
    amount = f"{checked} pairs of work on {len(work.stages)} stages, {by_stream} of one stream"
    return findings.result(amount + _but_replays(capture))


def times(capture: Capture, work: StageWork, pairs: list[Pairs], *, ours: bool) -> CheckResult:
    """No work that must come after began before; necessary, and no proof of a join."""
    findings = Findings("times", "nothing began before what it must come after had ended")
    _need_work(capture, work, findings, ours=ours)
    gpu, coarse = capture.gpu, _granularity(capture)
    exact = [one for one in pairs if not one.guessed]
    for one in exact:
        early = gpu["end"][one.first] - gpu["start"][one.then]
        for index in np.flatnonzero(early > coarse).tolist():
            what = f"{one.what}: {_event(capture, work, int(one.then[index]))} began {int(early[index])} ns before"
            what += f" {_event(capture, work, int(one.first[index]))} ended"
            findings.wrong(what, work.where(int(one.stage[index])))
    return findings.result(f"{sum(len(one.first) for one in exact)} pairs of work{_but_replays(capture)}")


def _need_work(capture: Capture, work: StageWork, findings: Findings, *, ours: bool) -> None:
    """Without work that must wait there is nothing that shows the joins; our own device always notes it."""
    in_graph = ", it may be in a graph, see graph_order" if _replayed(capture) else ""
    for name, kinds in (
        ("start_wait_gpu_stage", _WAIT),
        ("route or the experts", _READS),
        ("start_set_cpu_stage", (Kind.START_SET_CPU_STAGE,)),
    ):
        there = np.unique(work.stage[work.of(*kinds)])
        if not len(there):
            findings.missing(f"no work of {name} was seen{in_graph}")
        elif ours and len(there) < len(work.stages):
            absent = np.setdiff1d(np.arange(len(work.stages)), there)
            findings.missing(f"no work of {name} was seen", work.where(int(absent[0])))


def _but_replays(capture: Capture) -> str:
    """What was not looked at, for whoever reads the amount."""
    return ", none of it in replays: see graph_order" if _replayed(capture) else ""


def _replayed(capture: Capture) -> bool:
    return bool((capture.gpu["graph_node"] >= 0).any())


def _judge_waits(capture: Capture, work: StageWork, order: HappensBefore, pairs: Pairs, findings: Findings) -> None:
    apart = np.flatnonzero(order.lane[pairs.first] != order.lane[pairs.then])
    if not len(apart):
        return
    if not order.waits_recorded:
        findings.missing(f"{pairs.what}: the trace does not record every wait between streams")
        return
    first, then = pairs.first[apart], pairs.then[apart]
    sure = order.before(first, then)
    for index in np.flatnonzero(~sure).tolist():
        pair = f"{_event(capture, work, int(then[index]))} did not wait for {_event(capture, work, int(first[index]))}"
        where = work.where(int(pairs.stage[apart[index]]))
        if pairs.guessed or order.launch[first[index]] < 0 or order.launch[then[index]] < 0:
            findings.missing(f"{pairs.what}: no wait is seen, and it is not sure that one is needed: {pair}", where)
        else:
            findings.wrong(f"{pairs.what}: {pair}", where)


def _event(capture: Capture, work: StageWork, row: int) -> str:
    event, kind = capture.gpu[row], int(work.kind[row])
    name = KINDS[Kind(kind)].name if kind >= 0 else capture.names[event["name"]]
    key = (int(event["rank"]), int(event["device"]), int(event["stream"]))
    return f"{name} on {capture.streams.get(key, f'stream {key[2]}')}"


def _granularity(capture: Capture) -> int:
    """How far a clock that counts whole microseconds may be off; 0 for one that counts ns."""
    gpu = capture.gpu
    whole = not (gpu["start"] % _COARSE_NS).any() and not (gpu["end"] % _COARSE_NS).any()
    return _COARSE_NS if whole and len(gpu) else 0


def _said(capture: Capture, mark: np.void) -> bool:
    return bool(capture.ranges["category"][mark["row"]] >= 0)
