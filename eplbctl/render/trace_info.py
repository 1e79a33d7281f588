"""What traces are, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from eplbctl.render import tables
from eplbctl.render.inert import inert
from eplbctl.render.tables import Table

if TYPE_CHECKING:
    from moe_eplb.analysis.roles import RoleTime
    from moe_eplb.analysis.trace_info import TraceInfo

__all__ = ["json_text", "markdown", "text"]

_MOST = 20
_NAME = 60


def text(infos: Sequence[TraceInfo]) -> str:
    """Everything about every trace."""
    return "\n\n".join(
        part for info in infos for part in (_heading(info), *tables.text(_tables(info)), *_remarks(info))
    )


def markdown(infos: Sequence[TraceInfo]) -> str:
    """The same under a heading for each trace."""
    return "\n\n".join(tables.markdown_page(_heading(info), (), _tables(info), _remarks(info)) for info in infos)


def json_text(infos: Sequence[TraceInfo]) -> str:
    """The same for programs; times in ns."""
    return json.dumps({"schema": 1, "traces": [asdict(info) for info in infos]}, indent=2)


def _heading(info: TraceInfo) -> str:
    size = f"{info.file_bytes:,} bytes"
    return f"{inert(info.source)}: {inert(info.form)}, {size}, {info.span_ns / 1e6:,.3f} ms"


def _tables(info: TraceInfo) -> Iterator[Table]:
    ranks = ", ".join(map(str, info.ranks)) or "none"
    rows = [("ranks", f"{ranks} ({info.rank_source})")]
    rows += [(_NAMES[name], f"{count:,}") for name, count in info.counts.items()]
    rows += [(name, _range(numbers)) for name, numbers in (("iterations", info.iterations), ("layers", info.layers))]
    rows.append(("waits between streams", "recorded" if info.waits_recorded else "not recorded"))
    rows.append(("wall clock at 0", "unknown" if info.utc is None else f"{info.utc} ns since 1970"))
    yield Table("Holds", ("what", "how much"), rows)
    yield Table(
        "Streams", ("rank", "device", "stream", "name", "events", "total ms"), _streams(info), _more(info.streams)
    )
    yield Table("Ranges and marks", ("domain", "category", "ranges", "most often"), _domains(info), _more(info.domains))
    heads = ("role", "events", "total ms")
    yield Table("Device time by role", heads, [_time(time.name, time) for time in info.roles])
    unknown = [_time(_short(time.name), time) for time in info.unknown[:_MOST]]
    yield Table("Kernels that no rule knows", ("name", *heads[1:]), unknown, _more(info.unknown))


def _time(name: str, time: RoleTime) -> tuple[str, str, str]:
    return name, f"{time.events:,}", f"{time.total_ns / 1e6:,.3f}"


_NAMES = {
    "gpu": "device events", "calls": "runtime and driver calls", "ranges": "ranges and marks", "syncs": "waits",
    "nodes": "graph nodes made", "spans": "overhead and called functions",
}  # fmt: skip


def _streams(info: TraceInfo) -> list[tuple[object, ...]]:
    return [
        (s.rank, s.device, s.stream, _short(s.name), f"{s.events:,}", f"{s.total_ns / 1e6:,.3f}")
        for s in info.streams[:_MOST]
    ]


def _domains(info: TraceInfo) -> list[tuple[object, ...]]:
    return [
        (_short(d.domain) or "(default)", _short(d.category), f"{d.ranges:,}", ", ".join(map(_short, d.texts)))
        for d in info.domains[:_MOST]
    ]


def _short(name: str) -> str:
    return inert(name, _NAME)


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return "none are named"
    return f"{len(numbers):,} ({numbers[0]} to {numbers[-1]})"


def _more(rows: Sequence[object]) -> str:
    return f"{len(rows) - _MOST} more are left out; --format json has all." if len(rows) > _MOST else ""


def _remarks(info: TraceInfo) -> Iterator[str]:
    if info.alignment is not None:
        yield str(info.alignment)
    if info.incomplete:
        yield f"Incomplete: {inert(info.incomplete)}"
    yield from map(inert, info.notes)
