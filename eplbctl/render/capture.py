"""The tables of `moe_eplb.analysis.trace_report`: what of a trace's work was hidden, what was not, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eplbctl.render.inert import inert
from eplbctl.render.tables import Table

if TYPE_CHECKING:
    from moe_eplb.analysis.overlap import Hidden
    from moe_eplb.analysis.trace_report import PairReport, TraceReport
    from moe_eplb.core.verdict import CheckResult

__all__ = ["check_rows", "heading", "remarks", "tables"]

_MOST = 12
_NAME = 56


def heading(report: TraceReport) -> str:
    """What was read, in lines: source, format, counts, and what was asked for."""
    counts = (
        _count(len(report.ranks), "rank"), _count(report.gpus, "device"), _count(len(report.iterations), "iteration"),
        _count(len(report.layers), "layer"), _count(report.events, "device event"), f"{report.span_ns / 1e6:,.3f} ms",
    )  # fmt: skip
    lines = [f"{inert(report.source)} ({inert(report.form)}): {', '.join(counts)}"]
    lines += [f"Only {report.selection}"] if report.selection else []
    return "\n".join(lines)


def tables(report: TraceReport) -> Iterator[Table]:
    """All tables, the most asked-for first; those without rows have nothing to say."""
    yield check_rows(report.checks)
    yield _pairs(report)
    yield from _parts(report)
    yield _roles(report)
    yield _unknown(report)
    yield _exposed(report)
    yield _idle(report)
    yield _path(report)
    yield _stall(report)
    yield _collectives(report)
    yield _streams(report)


def remarks(report: TraceReport) -> Iterator[str]:
    """What a reader must know before believing the tables."""
    if report.incomplete:
        yield f"Incomplete: {inert(report.incomplete)}"
    if not report.all_layers:
        yield "Idle time, the critical path and main-stream time lost are of all layers."
    if report.stall is None:
        yield "Stall of the main streams: unknown, the trace does not record every wait between streams."
    if report.path is not None and not report.path.waits_known:
        yield "The critical path may have missed waits between streams: the trace does not record them all."
    if not report.iterations:
        yield "No event belongs to an iteration that the trace names, so nothing is given by iteration."
    if report.unmatched_collectives:
        yield f"{report.unmatched_collectives} communication kernels have no partner on some rank and are left out."
    yield from map(inert, report.notes)


def check_rows(checks: Sequence[CheckResult]) -> Table:
    """The order checks and limits, with the detail of those that are not valid below."""
    rows = [(check.name, check.status.value, inert(check.observed), check.expected) for check in checks]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for check in checks:
        if check.status.value != "valid" and (check.detail or check.where):
            reasons.setdefault((check.status.value, check.where, check.detail), []).append(check.name)
    details = [
        "\n".join([f"{', '.join(names)}: {status}{', ' if where else ''}{where}", *_indented(detail)])
        for (status, where, detail), names in reasons.items()
    ]
    return Table("Checks", ("check", "status", "observed", "expected"), rows, "\n".join(details))


def _indented(text: str) -> list[str]:
    return [f"  {inert(line)}" for line in text.splitlines()]


def _pairs(report: TraceReport) -> Table:
    heads = ("work", "total ms", "hidden ms", "exposed ms", "overlap", "when experts move", "else", "worst exposed us")
    rows = []
    for pair in report.pairs.values():
        worst = max((ns for iteration, ns in pair.worst.items() if iteration >= 0), default=None)
        rows.append((
            pair.name, *_hidden(pair.whole), _share(pair.updates.overlap), _share(pair.steady.overlap), _us(worst)
        ))  # fmt: skip
    dash = "there was no such work" if all(pair.known for pair in report.pairs.values()) else "unknown"
    return Table("Overlap", heads, rows, f"Worst exposed: of any rank in one iteration. A dash: {dash}.")


def _parts(report: TraceReport) -> Iterator[Table]:
    """The balancer's overlap by rank, stream, layer and iteration, the communication's by rank and stream."""
    for name, wanted in (("balancer", None), ("communication", ("rank", "stream"))):
        pair = report.pairs[name]
        if not pair.whole.total:
            continue
        heads = ("total ms", "hidden ms", "exposed ms", "overlap")
        for what, parts in _by(report, pair).items():
            if wanted is not None and what not in wanted:
                continue
            rows, note = _worst({key: (key, *_hidden(h)) for key, h in parts.items()}, parts)
            yield Table(f"Overlap of {name} by {what}", (what, *heads), rows, note)


def _by(report: TraceReport, pair: PairReport) -> dict[str, dict[Any, Hidden]]:
    streams = {f"rank {rank}, {_stream(report, rank, stream)}": h for (rank, stream), h in pair.streams.items()}
    named: dict[str, dict[Any, Hidden]] = {"rank": dict(pair.ranks), "stream": dict(streams)}
    for what, parts in (("layer", pair.layers), ("iteration", pair.iterations)):
        if any(number >= 0 for number in parts):
            named[what] = {number if number >= 0 else "none": hidden for number, hidden in parts.items()}
    return {what: parts for what, parts in named.items() if len(parts) > 1}


def _worst(rows: Mapping[Any, Sequence[Any]], parts: Mapping[Any, Hidden]) -> tuple[list[Sequence[Any]], str]:
    """All rows, or of many those with most exposed, in their order."""
    if len(rows) <= _MOST:
        return list(rows.values()), ""
    kept = set(sorted(parts, key=lambda key: -parts[key].exposed)[:_MOST])
    shown = [row for key, row in rows.items() if key in kept]
    return shown, f"The {_MOST} of {len(rows)} with most exposed; --format json has all."


def _roles(report: TraceReport) -> Table:
    total = sum(row.total_ns for row in report.roles)
    rows = [
        (row.role.value, f"{row.events:,}", _ms(row.total_ns), _share(row.total_ns / max(total, 1)), _ms(row.busy_ns))
        for row in report.roles
    ]
    return Table("Device time by role", ("role", "events", "total ms", "share", "busy ms"), rows)


def _unknown(report: TraceReport) -> Table:
    rows = [(_short(time.name), f"{time.events:,}", _ms(time.total_ns)) for time in report.unknown[:_MOST]]
    more = len(report.unknown) - len(rows)
    note = "They count as nothing; --roles FILE names them." + (f" {more} more are left out." if more else "")
    return Table("Kernels that no rule knows", ("name", "events", "total ms"), rows, note)


def _exposed(report: TraceReport) -> Table:
    heads = ("us", "rank", "iteration", "layer", "at ms", "work", "launched in")
    rows = [
        (
            f"{s.length / 1e3:.3f}", s.rank, _number(s.iteration), _number(s.layer), f"{s.start / 1e6:.3f}",
            ", ".join(_short(name) for name, _ in s.work[:2]), _short(" > ".join(s.ranges)) or "-",
        )
        for s in report.exposed
    ]  # fmt: skip
    return Table("Longest exposed stretches of the balancer", heads, rows)


def _idle(report: TraceReport) -> Table:
    causes = [c for c in (report.idle[0].causes if report.idle else ()) if any(row.causes[c] for row in report.idle)]
    rows = [
        (row.rank, row.device, _ms(row.span_ns), _ms(row.idle_ns), *(_ms(row.causes[cause]) for cause in causes))
        for row in report.idle
    ]
    return Table("Idle time of the devices by cause, ms", ("rank", "device", "span", "idle", *causes), rows)


def _path(report: TraceReport) -> Table:
    path = report.path
    rows = [(what, _ms(ns), _share(ns / path.length_ns)) for what, ns in path.by_what.items() if ns] if path else []
    note = f"The balancer's share is {path.balancer_share:.2%}." if path and path.balancer_share is not None else ""
    return Table("What the steps' length is made of (critical path)", ("part", "ms", "share"), rows, note)


def _stall(report: TraceReport) -> Table:
    stall = report.stall
    rows = [("idle at a wait for the balancer", _ms(stall.idle_ns)), ("spinning", _ms(stall.spin_ns))] if stall else []
    return Table("Main-stream time lost to the balancer", ("as", "ms"), rows)


def _collectives(report: TraceReport) -> Table:
    heads = ("collective", "count", "skew p50 us", "skew max us", "waited ms", "imbalance", "last, by rank")
    rows = [
        (
            _short(row.name), row.count, _us(row.skew_p50_ns), _us(row.skew_max_ns), _ms(row.waited_ns),
            f"{row.imbalance:.3f}", " ".join(f"{rank}:{count}" for rank, count in row.last.items() if count),
        )
        for row in report.collectives[:_MOST]
    ]  # fmt: skip
    return Table("Collectives over all ranks", heads, rows)


def _streams(report: TraceReport) -> Table:
    rows = [
        (
            p.rank,
            *(_stream(report, p.rank, s) for s in (p.first, p.second)),
            *map(_ms, (p.first_ns, p.second_ns, p.both_ns)),
        )
        for p in report.streams[:_MOST]
    ]
    return Table("Streams at the same time", ("rank", "stream", "and", "busy ms", "and ms", "both ms"), rows)


def _stream(report: TraceReport, rank: int, stream: int) -> str:
    return report.stream_names.get((rank, stream)) or f"stream {stream}"


def _hidden(hidden: Hidden) -> tuple[str, str, str, str]:
    if not hidden.total:
        return "-", "-", "-", "-"
    return _ms(hidden.total), _ms(hidden.hidden), _ms(hidden.exposed), _share(hidden.overlap)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _ms(ns: int) -> str:
    return f"{ns / 1e6:,.3f}"


def _us(ns: int | None) -> str:
    return "-" if ns is None else f"{ns / 1e3:,.1f}"


def _number(number: int) -> str:
    return "-" if number < 0 else str(number)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _short(name: str) -> str:
    clean = inert(name)
    return clean if len(clean) <= _NAME else f"{clean[: _NAME - 1]}…"
