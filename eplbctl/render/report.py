"""The tables of `moe_eplb.analysis.stages` as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from eplbctl.render.text import table

if TYPE_CHECKING:
    from moe_eplb.analysis.stages import Report

__all__ = ["balance_and_moves", "json_text", "markdown", "text"]


class _Table(NamedTuple):
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


def text(report: Report) -> str:
    """All tables, then the first violation of the call order and what is missing."""
    tables = [_titled(t) for t in _tables(report)]
    return "\n\n".join([*tables, *_remarks(report)])


def markdown(report: Report, title: str) -> str:
    """The same for a pull request or a log book."""
    tables = [f"## {t.title}\n\n{table(t.headers, t.rows, style='github')}" for t in _tables(report)]
    return "\n\n".join([f"# {title}", *tables, *_remarks(report)])


def json_text(report: Report) -> str:
    """The report's own fields."""
    return json.dumps({"schema": 1, **dataclasses.asdict(report)}, indent=2)


def balance_and_moves(report: Report) -> str:
    """The two tables that a run ends with; empty for a run that routed nothing."""
    return "\n\n".join(_titled(t) for t in (_balance(report), _moves(report)) if t.rows)


def _tables(report: Report) -> Iterator[_Table]:
    everything = (_stages(report), _moves(report), _balance(report), _overlap(report))
    return (t for t in everything if t.rows)


def _titled(part: _Table) -> str:
    return f"{part.title}\n{table(part.headers, part.rows)}"


def _remarks(report: Report) -> Iterator[str]:
    yield f"First violation of the call order: {report.violation or 'none'}"
    if report.incomplete:
        yield f"Incomplete: {report.incomplete}"


def _stages(report: Report) -> _Table:
    headers = ("kind", "stream", "calls", "p50 us", "p95 us", "p99 us", "total ms")
    rows = [
        (s.name, s.stream, s.calls, f"{s.p50_us:.1f}", f"{s.p95_us:.1f}", f"{s.p99_us:.1f}", f"{s.total_ms:.2f}")
        for s in report.stages
    ]
    return _Table("Stages, all ranks", headers, rows)


def _moves(report: Report) -> _Table:
    headers = ("layer", "commits", "slots moved", "bytes", "slots changed at the end", "of them to another rank")
    rows = [
        (m.layer, m.commits, m.moved_slots, f"{m.bytes:,}", f"{m.net_slots} of {m.slots}", m.cross_rank_net_slots)
        for m in report.moves
    ]
    return _Table("Moves", headers, rows)


def _balance(report: Report) -> _Table:
    headers = ("layer", "first placement", "measured")
    rows = [(row.layer, f"{row.static_start:.3f}", f"{row.now:.3f}") for row in report.balance]
    return _Table("Balancedness (mean rank load / max rank load)", headers, rows)


def _overlap(report: Report) -> _Table:
    headers = ("pair", "total ms", "hidden ms", "exposed ms", "overlap")
    rows = [
        (row.name, f"{row.total_ms:.3f}", f"{row.hidden_ms:.3f}", f"{row.exposed_ms:.3f}", _share(row.overlap))
        for row in report.overlap
    ]
    return _Table("Overlap", headers, rows)


def _share(overlap: float | None) -> str:
    return "-" if overlap is None else f"{overlap:.1%}"
