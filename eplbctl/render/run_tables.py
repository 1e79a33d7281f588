"""The tables of `moe_eplb.analysis.stages`: what a run spent its time on, what moved, and what it brought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eplbctl.render.tables import Table, text

if TYPE_CHECKING:
    from moe_eplb.analysis.moves import LayerMoves
    from moe_eplb.analysis.stages import Report

__all__ = ["balance_and_moves", "plans_waited_for", "remarks", "tables"]


def tables(report: Report) -> Iterator[Table]:
    """All tables, also those without rows."""
    yield _stages(report)
    yield _moves(report)
    yield _balance(report)


def remarks(report: Report) -> Iterator[str]:
    """The first violation of the call order, what is missing, and plans that came late."""
    yield f"First violation of the call order: {report.violation or 'none'}"
    if report.incomplete:
        yield f"Incomplete: {report.incomplete}"
    yield from plans_waited_for(report)


def plans_waited_for(report: Report) -> Iterator[str]:
    """That a GPU's run waited for plans, which makes steps longer and changes no result."""
    waits = report.waits
    if waits is not None and waits.waited:
        yield (
            f"Waited for {waits.waited} of {waits.plans} plans, {waits.longest_ms:.1f} ms at most: with a larger "
            "balancer.commit_delay they have more time"
        )


def balance_and_moves(report: Report) -> str:
    """The two tables that a run ends with; empty for a run that routed nothing."""
    return "\n\n".join(text((_balance(report), _moves(report))))


def _stages(report: Report) -> Table:
    headers = ("kind", "stream", "calls", "p50 us", "p95 us", "p99 us", "total ms")
    rows = [
        (s.name, s.stream, s.calls, f"{s.p50_us:.1f}", f"{s.p95_us:.1f}", f"{s.p99_us:.1f}", f"{s.total_ms:.2f}")
        for s in report.stages
    ]
    return Table("Stages, all ranks", headers, rows)


def _moves(report: Report) -> Table:
    headers = (
        "layer",
        "commits",
        "without a move",
        "slots moved",
        "bytes",
        "copied from",
        "changed at the end",
        "of them to another rank",
    )
    rows = [
        (m.layer, m.commits, m.idle_commits, m.moved_slots, f"{m.bytes:,}", _sources(m), f"{m.net_slots} of {m.slots}",
         m.cross_rank_net_slots)
        for m in report.moves
    ]  # fmt: skip
    return Table("Moves", headers, rows)


def _sources(moves: LayerMoves) -> str:
    if len(moves.by_source) < 2:
        return next(iter(moves.by_source), "-")
    total = sum(moves.by_source.values())
    return ", ".join(f"{source} {size / total:.0%}" for source, size in moves.by_source.items())


def _balance(report: Report) -> Table:
    headers = ("layer", "first placement", "measured")
    rows = [(row.layer, f"{row.static_start:.3f}", f"{row.now:.3f}") for row in report.balance]
    return Table("Balancedness (mean rank load / max rank load)", headers, rows)
