"""Was the API called in a legal order, and did the streams' work happen in the order that the joins promise."""

from __future__ import annotations

from moe_eplb.analysis.conformance import Replay, Violation, replay
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.judges.reductions import judge_reductions
from moe_eplb.analysis.judges.spans import Span, Stage, spans
from moe_eplb.analysis.run_folder import Place, RunFolder
from moe_eplb.analysis.trace import OPEN, Records, Trace
from moe_eplb.core.events import KINDS, STREAMS, Kind
from moe_eplb.core.verdict import CheckResult

__all__ = ["call_order", "stream_join"]

_STATISTICS = (
    Kind.UPDATE_LOCAL_STATISTIC, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS,
    Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE,
)  # fmt: skip


def call_order(folder: RunFolder) -> CheckResult:
    """Every rank's calls follow the protocol; where the scenario expects a protocol error, just that one breaks it."""
    findings = Findings("call_order", "every call is legal where it is made")
    if folder.trace is None:
        findings.missing("the run left no trace")
        return findings.result("nothing")
    outcome = replay(folder.trace, folder.dynamic_layers)
    _judge_replay(folder, folder.trace, outcome, findings)
    _need_complete_logs(folder, folder.trace, findings)
    for rank in folder.ranks:
        if not outcome.calls.get(rank):
            findings.missing(f"rank {rank} recorded no stage call")
    return findings.result(f"{sum(outcome.calls.values())} stage calls on {len(outcome.calls)} ranks")


def _judge_replay(folder: RunFolder, trace: Trace, outcome: Replay, findings: Findings) -> None:
    expect = folder.scenario.expect_error
    for found in outcome.violations:
        # The call that raises is the last that a script makes; anything recorded after it is a second fault.
        if expect is None or found.code != expect.code or found.after:
            findings.wrong(f"{found.code} {found.what}{_around(found)}", f"rank {found.rank}, record {found.seq}")
    if expect is None and not folder.scripted:
        for rank, what in outcome.unfinished.items():
            # Of a run that was cut short, or a log that was full, an open iteration proves nothing.
            note = findings.missing if folder.failed or trace.ranks[rank].dropped else findings.wrong
            note(f"rank {rank}: {what}")


def _around(found: Violation) -> str:
    return f"; after {' / '.join(found.before) or 'nothing'}; before {' / '.join(found.after) or 'nothing'}"


def _need_complete_logs(folder: RunFolder, trace: Trace, findings: Findings) -> None:
    for rank in folder.ranks:
        if rank not in trace.ranks:
            findings.missing(f"rank {rank} left no event log")
    if incomplete := trace.incomplete():
        findings.missing(incomplete)


def stream_join(folder: RunFolder) -> CheckResult:
    """The work itself was in order, by the records that the device wrote.

    No work was put on a stream without waiting for what it must come after. Where experts move: the wait ended before
    route and experts began; the hand-over began after the experts and ended before `done_set_cpu_stage` returned; sums
    over the ranks were made as often as the scenario says, after all that they hold was counted.
    """
    findings = Findings(
        "stream_join", "wait before route and experts, hand-over after experts and before done_set returns"
    )
    if folder.trace is None:
        findings.missing("the run left no trace")
        return findings.result("nothing")
    _need_complete_logs(folder, folder.trace, findings)
    _judge_unordered(folder.trace.records, findings)
    judge_reductions(folder, folder.trace, findings)
    if folder.moving:
        seen, on_host = _Spans(folder.trace.records), folder.scenario.device == "cpu"
        for place in folder.places:
            for rank in folder.ranks:
                _judge_joins(seen, Stage(rank, place.layer, place.iteration), findings, on_host=on_host)
    return findings.result(f"{len(folder.places) * len(folder.ranks)} layers x iterations x ranks")


def _judge_unordered(records: Records, findings: Findings) -> None:
    """What the device itself saw: work that was told to wait too little, whenever it happened to run."""
    found = records.kinds(Kind.UNORDERED)
    for rank, layer, iteration, stream, kind, earlier in zip(
        *(column.tolist() for column in (found.rank, found.layer, found.iteration, found.stream, found.a, found.b)),
        strict=True,
    ):
        what = f"{KINDS[Kind(kind)].name} on {STREAMS[stream]} did not wait"
        whom = f"for {KINDS[Kind(earlier >> 8)].name} on {STREAMS[earlier & 255]}"
        findings.wrong(f"{what} {whom}", f"rank {rank}, {Place(layer, iteration)}")


class _Spans:
    """Spans of the kinds of records that the joins order."""

    def __init__(self, records: Records) -> None:
        device, host = records.device, records.host.where(records.host.end != OPEN)
        self.wait = spans(device.kinds(Kind.START_WAIT_GPU_STAGE))
        self.route = spans(device.kinds(Kind.ROUTE))
        self.experts = spans(device.kinds(Kind.EXPERTS))
        self.hand_over = spans(device.kinds(Kind.START_SET_CPU_STAGE))
        self.statistics = spans(device.kinds(*_STATISTICS))
        self.done = spans(host.kinds(Kind.DONE_SET_CPU_STAGE))


def _judge_joins(seen: _Spans, stage: Stage, findings: Findings, *, on_host: bool) -> None:
    where = f"rank {stage.rank}, {Place(stage.layer, stage.iteration)}"
    # A GPU's work goes on when the call has returned; what later work waits for is then seen by `_judge_unordered`.
    names = ("wait", "route", "experts", "hand_over", "done" if on_host else "hand_over")
    found = [getattr(seen, name).get(stage) for name in names]
    absent = sorted({name for name, span in zip(names, found, strict=True) if span is None})
    if absent:
        findings.missing(f"no record of {', '.join(absent)}", where)
        return
    wait, route, experts, hand_over, done = (span for span in found if span is not None)
    statistics = seen.statistics.get(stage, Span(wait.end, hand_over.start))  # `statistics` misses them, not this one
    for what, earlier, later in (
        ("route began {} ns before the wait ended", wait.end, route.start),
        ("experts began {} ns before the wait ended", wait.end, experts.start),
        ("statistics began {} ns before the wait ended", wait.end, statistics.start),
        ("the hand-over began {} ns before the experts ended", experts.end, hand_over.start),
        ("the hand-over began {} ns before statistics ended", statistics.end, hand_over.start),
        ("done_set_cpu_stage returned {} ns before the hand-over ended", hand_over.end, done.end),
    ):
        if earlier > later:
            findings.wrong(what.format(earlier - later), where)
