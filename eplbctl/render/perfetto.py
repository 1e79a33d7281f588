"""A trace as Chrome's Trace Event JSON, which ui.perfetto.dev opens, with our verdicts as a process of their own.

Times are us since the trace's first event, written as decimals with every ns. Processes are ranks, threads are streams
and host threads. Source of the format: Chrome's "Trace Event Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from eplbctl.render.inert import inert
from moe_eplb.analysis.perfetto import Slice, Track, counters, iteration_starts, tracks
from moe_eplb.core.verdict import CheckResult, Status

if TYPE_CHECKING:
    from moe_eplb.analysis.capture import Capture
    from moe_eplb.analysis.trace_report import TraceReport

__all__ = ["text"]

_EXPOSED, _COUNTED, _CHECKS = 1, 500, 1000
_LONGEST_NAME = 4000
_ITERATION = re.compile(r"iteration (\d{1,9})\b")


def text(report: TraceReport, capture: Capture) -> str:
    """The file's content, one event a line.

    Args:
        report: Whose checks, exposed stretches and counters stand in the verdict's tracks.
        capture: What is shown, with roles.
    """
    first, last = _span(capture)
    made, left_out = tracks(capture, last)
    verdict = max(capture.ranks, default=0) + 1
    events = [*_ranks(capture), *_verdict_names(report, verdict)]
    for track in made:
        events += _thread(track)
        events += (line for one in track.slices for line in _slice(track, one, first))
    events += _verdicts(report, verdict, first, last, iteration_starts(capture))
    head = _head(report, capture, first, left_out)
    return head[:-1] + ',"traceEvents":[\n' + ",\n".join(events) + "\n]}\n"


def _span(capture: Capture) -> tuple[int, int]:
    tables = [table for table in (capture.gpu, capture.calls, capture.ranges) if len(table)]
    first = min((int(table["start"].min()) for table in tables), default=0)
    return first, max((max(int(table["end"].max()), int(table["start"].max())) for table in tables), default=first)


def _head(report: TraceReport, capture: Capture, first: int, left_out: int) -> str:
    ranks = capture.ranks
    about: dict[str, Any] = {"schemaVersion": 1, "displayTimeUnit": "ns"}
    about |= {"distributedInfo": {"rank": ranks[0]}} if len(ranks) == 1 else {}
    about |= {"baseTimeNanoseconds": capture.utc + first} if capture.utc is not None else {}
    said = {"source": report.source, "format": report.form, "first_ns": str(first), "incomplete": report.incomplete}
    notes = list(report.notes)
    notes += [f"{left_out} events are left out: too many overlap on one stream or thread"] if left_out else []
    about["otherData"] = {**{key: _clean(value) for key, value in said.items()}, "notes": _clean("; ".join(notes))}
    return orjson.dumps(about).decode()


def _ranks(capture: Capture) -> Iterator[str]:
    for rank in capture.ranks:
        yield _meta("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _meta("process_sort_index", rank, 0, {"sort_index": rank + 1})


def _thread(track: Track) -> Iterator[str]:
    yield _meta("thread_name", track.rank, track.number, {"name": track.name})
    yield _meta("thread_sort_index", track.rank, track.number, {"sort_index": track.order})


def _slice(track: Track, one: Slice, first: int) -> Iterator[str]:
    place = f'"pid":{track.rank},"tid":{track.number},"ts":{_us(one.start - first)}'
    head = f'"name":{_text(one.name)},"cat":"{one.category}",{place}'
    args = orjson.dumps({key: _clean(v) if isinstance(v, str) else v for key, v in one.args.items()}).decode()
    if one.length is None:
        yield f'{{"ph":"i","s":"t",{head},"args":{args}}}'
        return
    yield f'{{"ph":"X",{head},"dur":{_us(one.length)},"args":{args}}}'
    if one.flow is not None:
        ends = '"ph":"s"' if track.launches else '"ph":"f","bp":"e"'
        yield f'{{{ends},"id":{one.flow},"name":"ac2g","cat":"ac2g",{place}}}'


def _verdict_names(report: TraceReport, pid: int) -> Iterator[str]:
    yield _meta("process_name", pid, 0, {"name": "eplbctl verdict"})
    yield _meta("process_sort_index", pid, 0, {"sort_index": -1})
    named = {_EXPOSED + place: f"exposed, rank {rank}" for place, rank in enumerate(report.ranks)}
    named |= {_CHECKS + number: f"check: {check.name}" for number, check in enumerate(report.checks)}
    for tid, name in named.items():
        yield _meta("thread_name", pid, tid, {"name": name})
        yield _meta("thread_sort_index", pid, tid, {"sort_index": tid})


def _verdicts(report: TraceReport, pid: int, first: int, last: int, starts: dict[int, int]) -> Iterator[str]:
    for number, check in enumerate(report.checks):
        yield from _check(check, pid, _CHECKS + number, first, last, starts)
    for number, one in enumerate(report.exposed, 1):
        tid = _EXPOSED + report.ranks.index(one.rank)
        work = ", ".join(f"{inert(name)}: {ns} ns" for name, ns in one.work[:5])
        args = {"length_ns": one.length, "iteration": one.iteration, "layer": one.layer, "work": work}
        args["launched_in"] = " > ".join(inert(name) for name in one.ranges)
        yield _complete(f"exposed #{number}", pid, tid, one.start - first, one.length, args)
    for name, values in counters(report, starts).items():
        for value in values:
            place = f'"pid":{pid},"tid":{_COUNTED},"ts":{_us(value.at - first)}'
            yield f'{{"ph":"C","name":{_text(name)},{place},"args":{orjson.dumps(value.values).decode()}}}'


def _check(check: CheckResult, pid: int, tid: int, first: int, last: int, starts: dict[int, int]) -> Iterator[str]:
    """A slice over the whole trace, and an instant at the first violation: the start of the iteration that it names."""
    args = {"status": check.status.value, "observed": check.observed, "expected": check.expected}
    args |= {"where": check.where, "detail": check.detail}
    yield _complete(f"{check.name}: {check.status.value}", pid, tid, 0, last - first, args)
    if check.status is Status.INVALID:
        found = _ITERATION.search(check.where)
        at = starts.get(int(found[1]), first) if found else first
        said = orjson.dumps({"where": _clean(check.where), "detail": _clean(check.detail)}).decode()
        name = _text(f"violation of {check.name}")
        yield f'{{"ph":"i","s":"p","name":{name},"pid":{pid},"tid":{tid},"ts":{_us(at - first)},"args":{said}}}'


def _complete(name: str, pid: int, tid: int, start: int, length: int, args: dict[str, Any]) -> str:
    said = orjson.dumps({key: _clean(v) if isinstance(v, str) else v for key, v in args.items()}).decode()
    place = f'"pid":{pid},"tid":{tid},"ts":{_us(start)},"dur":{_us(length)}'
    return f'{{"ph":"X","cat":"eplb_verdict","name":{_text(name)},{place},"args":{said}}}'


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> str:
    said = orjson.dumps({key: _clean(v) if isinstance(v, str) else v for key, v in args.items()}).decode()
    return f'{{"ph":"M","name":"{name}","pid":{pid},"tid":{tid},"args":{said}}}'


def _us(ns: int) -> str:
    whole, rest = divmod(abs(ns), 1000)
    return f"{'-' if ns < 0 else ''}{whole}.{rest:03}"


def _text(name: str) -> str:
    return orjson.dumps(_clean(name)).decode()


def _clean(text: str) -> str:
    """Text that is valid Unicode; what a viewer does with it is its own affair, so only what is very long is cut."""
    sound = text.encode("utf-8", "backslashreplace").decode()
    return sound if len(sound) <= _LONGEST_NAME else f"{sound[:_LONGEST_NAME]}… ({len(sound)} characters)"
