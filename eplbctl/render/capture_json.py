"""A report on a capture for other programs: times in ns, shares as fractions, null where nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_eplb.analysis.overlap import Hidden
    from moe_eplb.analysis.trace_report import PairReport, TraceReport

__all__ = ["document"]


def document(report: TraceReport, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """One object with everything; -1 as rank, layer or iteration is work that belongs to none that the trace names."""
    plain = ("source", "form", "rank_source", "gpus", "events", "span_ns", "selection", "incomplete")
    return {
        **{name: getattr(report, name) for name in plain},
        "ranks": list(report.ranks), "iterations": list(report.iterations), "layers": list(report.layers),
        "update_iterations": list(report.update_iterations), "notes": list(report.notes),
        "streams": [{"rank": r, "stream": s, "name": name} for (r, s), name in report.stream_names.items()],
        "checks": [asdict(check) | {"status": check.status.value} for check in report.checks],
        "metrics": dict(metrics),
        "overlap": {name: _pair(pair) for name, pair in report.pairs.items()},
        "roles": _rows(report.roles), "unknown": _rows(report.unknown), "stream_pairs": _rows(report.streams),
        "exposed": [_rows([s])[0] | {"length_ns": s.length} for s in report.exposed],
        "idle": _rows(report.idle),
        "critical_path": None if report.path is None else _rows([report.path])[0],
        "stall": None if report.stall is None else _rows([report.stall])[0],
        "collectives": _rows(report.collectives), "unmatched_collectives": report.unmatched_collectives,
    }  # fmt: skip


def _rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [{name: _plain(value) for name, value in asdict(row).items()} for row in rows]


def _plain(value: Any) -> Any:
    return {str(key): part for key, part in value.items()} if isinstance(value, dict) else value


def _pair(pair: PairReport) -> dict[str, Any]:
    return {
        **{part: _hidden(getattr(pair, part)) if pair.known else _UNKNOWN for part in ("whole", "updates", "steady")},
        "ranks": [{"rank": rank, **_hidden(hidden)} for rank, hidden in pair.ranks.items()],
        "layers": [{"layer": layer, **_hidden(hidden)} for layer, hidden in pair.layers.items()],
        "iterations": [
            {"iteration": iteration, **_hidden(hidden), "worst_exposed_ns": pair.worst.get(iteration, 0)}
            for iteration, hidden in pair.iterations.items()
        ],
        "streams": [{"rank": r, "stream": s, **_hidden(hidden)} for (r, s), hidden in pair.streams.items()],
    }  # fmt: skip


_UNKNOWN: dict[str, Any] = dict.fromkeys(("total_ns", "hidden_ns", "exposed_ns", "overlap"))


def _hidden(hidden: Hidden) -> dict[str, Any]:
    return {
        "total_ns": hidden.total, "hidden_ns": hidden.hidden, "exposed_ns": hidden.exposed, "overlap": hidden.overlap
    }  # fmt: skip
