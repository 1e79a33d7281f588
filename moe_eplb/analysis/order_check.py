"""Was the balancer's API called in a legal order, and did its work wait for what it must come after: any capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.call_names import CallNames, load_call_names
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.joins import HappensBefore
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.order_check_calls import Found, find_calls
from moe_eplb.analysis.order_check_clocks import clocks
from moe_eplb.analysis.order_check_complete import lacks
from moe_eplb.analysis.order_check_graph import graph_order, has_graphs, own_graph_order
from moe_eplb.analysis.order_check_joins import joins, ordered_pairs, times
from moe_eplb.analysis.order_check_replay import IllegalCall, Replayed, replay_calls
from moe_eplb.analysis.order_check_waits import waits_not_work
from moe_eplb.analysis.order_check_work import stage_work
from moe_eplb.analysis.roles import prepare
from moe_eplb.core.events import Kind
from moe_eplb.core.verdict import CheckResult, Status, worst

__all__ = ["OrderReport", "check_order"]

NOT_SEEN = "no calls of the balancer were seen; name them with --call-names"
OURS = "moe_eplb"
_OF_WORK = ("joins", "times")
_OF_CALLS = ("call_order", *_OF_WORK, "complete")


@dataclass(frozen=True)
class OrderReport:
    """All order checks of a capture.

    Attributes:
        checks: call_order, joins, times, complete, graph_order where there are graphs, clocks, waits_not_work.
        illegal: The first illegal call of each rank that has one, with its neighbours.
        calls: Stage calls by rank.
        notes: What had to be assumed.
    """

    checks: tuple[CheckResult, ...]
    illegal: tuple[IllegalCall, ...] = ()
    calls: dict[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of all checks."""
        return worst(check.status for check in self.checks)

    def check(self, name: str) -> CheckResult:
        """The check of a name."""
        return next(check for check in self.checks if check.name == name)


def check_order(capture: Capture, tables: Sequence[Path | str] = (), names: CallNames | None = None) -> OrderReport:
    """Judge the order of the balancer's calls and of its work in a capture.

    Args:
        capture: What was recorded; `moe_eplb.analysis.roles.prepare` is applied if it was not yet.
        tables: Further tables of call names, see `moe_eplb.analysis.call_names.load_call_names`.
        names: All names, in place of tables.

    Raises:
        TraceError: E070 a table is not acceptable.
    """
    names = names or load_call_names(tables)
    if (capture.gpu["role"] == c.UNSET_ROLE).any():
        capture = prepare(capture)
    found = find_calls(capture, names)
    seen = _stage_calls(np.concatenate([found.calls, found.graphs.captured]))
    of_clocks = (clocks(capture), waits_not_work(capture, names))
    if not seen:
        return OrderReport((*_not_seen(capture), *of_clocks))
    ours = capture.form == OURS
    replayed = replay_calls(capture, found, ours=ours)
    missing = lacks(capture, found.calls, replayed.holes)
    of_order = [_call_order(found, seen, replayed), *_of_work(capture, found, replayed, names, ours=ours)]
    graphs = has_graphs(capture) or any(replayed.by_graph_of.values())
    judge = own_graph_order if ours else graph_order
    of_graphs = [judge(capture, found, replayed)] if graphs else []
    of_order, of_graphs = ([_never_valid(one, missing) for one in some] for some in (of_order, of_graphs))
    checks = (*of_order, _complete(missing, seen), *of_graphs, *of_clocks)
    return OrderReport(checks, tuple(replayed.illegal), seen, _notes(found, replayed))


def _not_seen(capture: Capture) -> list[CheckResult]:
    names = [*_OF_CALLS, *(["graph_order"] if has_graphs(capture) else [])]
    return [CheckResult(name, Status.UNKNOWN, "0 calls", "calls of the balancer", NOT_SEEN) for name in names]


def _call_order(found: Found, seen: dict[int, int], replayed: Replayed) -> CheckResult:
    """Every rank's calls follow the protocol."""
    findings = Findings("call_order", "every call is legal where it is made")
    for illegal in replayed.illegal:
        findings.wrong(_one_line(illegal), f"rank {illegal.rank}, {illegal.call.start} ns")
    if replayed.flags_inferred:
        for rank in replayed.unordered:
            findings.missing("no start_iter was seen, so that nothing is known of iterations", f"rank {rank}")
    return findings.result(", ".join((_amount(seen), *_notes(found, replayed))))


def _one_line(illegal: IllegalCall) -> str:
    before, after = (" / ".join(map(str, calls)) or "nothing" for calls in (illegal.before, illegal.after))
    path = f"; in {' > '.join(illegal.path)}" if illegal.path else ""
    return f"{illegal.code} {illegal.what}: {illegal.call}; after {before}; before {after}{path}"


def _notes(found: Found, replayed: Replayed) -> tuple[str, ...]:
    notes = [f"{what} counted" for what in found.counted]
    notes += ["flags inferred"] if replayed.flags_inferred else []
    graphs = sum(replayed.by_graph_of.values())
    return (*notes, *([f"{graphs} iterations replay a graph"] if graphs else []))


def _of_work(capture: Capture, found: Found, replayed: Replayed, names: CallNames, *, ours: bool) -> list[CheckResult]:
    inferred = replayed.flags_inferred
    work, order = stage_work(capture, found, replayed.flags, names, ours=ours), HappensBefore(capture)
    if not len(work.stages):
        status = Status.UNKNOWN if inferred else Status.VALID
        why = "no layer is seen to have dynamic routing"
        return [CheckResult(name, status, "0 layers x iterations", why, why if inferred else "") for name in _OF_WORK]
    pairs = ordered_pairs(capture, work, order)
    return [joins(capture, work, order, pairs, found.unordered, ours=ours), times(capture, work, pairs, ours=ours)]


def _never_valid(check: CheckResult, missing: list[str]) -> CheckResult:
    """What a trace lacks may have been wrong, and may be why something looks wrong."""
    if not missing or check.status is Status.UNKNOWN:
        return check
    found = f"; {check.detail}" if check.detail else ""
    return replace(check, status=Status.UNKNOWN, detail=f"the trace is not complete: {missing[0]}{found}")


def _complete(missing: list[str], seen: dict[int, int]) -> CheckResult:
    findings = Findings("complete", "nothing is missing from the first call to the last")
    for what in missing:
        findings.missing(what)
    return findings.result(_amount(seen))


def _amount(seen: dict[int, int]) -> str:
    return f"{sum(seen.values())} stage calls on {len(seen)} rank{'s' * (len(seen) > 1)}"


def _stage_calls(calls: Table) -> dict[int, int]:
    """Stage calls by rank; a route alone is made without a balancer too."""
    stage = calls[calls["kind"] <= Kind.DONE_SET_CPU_STAGE]
    if not (stage["kind"] != Kind.ROUTE).any():
        return {}
    ranks, counts = np.unique(stage["rank"], return_counts=True)
    return dict(zip(ranks.tolist(), counts.tolist(), strict=True))
