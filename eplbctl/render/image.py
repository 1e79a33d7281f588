"""The timeline of a trace as an image, for a log book or a pull request: SVG or PNG, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import quoteattr

from eplbctl.render.inert import inert
from eplbctl.render.palette import RANGE, ROLES, SCHEMES, Look, ink_on
from moe_eplb.analysis.capture import ROLES as ROLE_ORDER
from moe_eplb.analysis.selection import EVERYTHING, Selection
from moe_eplb.analysis.timeline import IterationSpan, Lane, LaneKind, Timeline, make_timeline
from moe_eplb.core.errors import UsageError
from moe_eplb.core.events import Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_eplb.analysis.capture import Capture
    from moe_eplb.analysis.trace_report import TraceReport

__all__ = ["png", "svg"]

_MOST_EVENTS, _MOST_ROWS = 20_000, 240
_WIDTH, _ROW, _DOTS = 15.0, 0.24, 110
_UNITS = (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000), ("ns", 1))
_HATCHES = {
    "slash": "/////",
    "backslash": "\\\\\\\\\\",
    "lines": "-----",
    "bars": "|||||",
    "dots": ".....",
    "cross": "xxxx",
}
_SCHEME = SCHEMES["light"]


class _Row(NamedTuple):
    """A line of the picture: a strip of exposed stretches, or one row of a lane."""

    label: str
    rank: int
    lane: Lane | None
    row: int
    times: Any


def svg(report: TraceReport, capture: Capture, selection: Selection = EVERYTHING) -> str:
    """The image as SVG text, the same for the same trace; its text stays text.

    Raises:
        UsageError: E074 matplotlib is not installed.
    """
    data = _drawn(report, capture, selection, "svg", metadata={"Date": None, "Title": "Timeline"})
    label = quoteattr(f"Timeline of {_title(report)}: lanes by rank and stream, colours by role")
    return data.decode().replace("<svg ", f'<svg role="img" aria-label={label} ', 1)


def png(report: TraceReport, capture: Capture, selection: Selection = EVERYTHING) -> bytes:
    """The image as a PNG file.

    Raises:
        UsageError: E074 matplotlib is not installed.
    """
    return _drawn(report, capture, selection, "png", dpi=_DOTS, metadata={"Software": None})


def _drawn(report: TraceReport, capture: Capture, selection: Selection, form: str, **options: Any) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'moe-eplb[plot]', or use --format html, which draws without it"
        raise UsageError("E074", "an image needs matplotlib", why=str(error), hint=hint) from error
    timeline = make_timeline(capture, selection, _MOST_EVENTS)
    settings: Any = dict(matplotlib.rcParamsDefault)  # and not what the user's own file of settings says
    settings.pop("backend")
    settings |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "eplbctl",
        "hatch.linewidth": 0.7,
        "font.family": "DejaVu Sans",
    }
    with matplotlib.rc_context(settings), io.BytesIO() as file:
        figure = Figure(facecolor=_SCHEME.background)
        _draw(figure, report, timeline)
        figure.savefig(file, format=form, **options)
        return file.getvalue()


def _draw(figure: Figure, report: TraceReport, timeline: Timeline) -> None:
    rows = list(_rows(timeline))
    left_out = max(0, len(rows) - _MOST_ROWS)
    rows = rows[:_MOST_ROWS]
    height = len(rows) * _ROW + 2.1
    figure.set_size_inches(_WIDTH, height)
    axes = figure.add_axes((0.13, 1.25 / height, 0.855, len(rows) * _ROW / height))
    axes.set_xlim(*_in_unit(timeline, timeline.view))
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    for place, row in enumerate(rows):
        _draw_row(axes, timeline, row, place)
    _draw_axis(axes, timeline, rows)
    _draw_iterations(axes, timeline)
    notes = list(timeline.notes) + ([f"{left_out} rows are left out below"] if left_out else [])
    figure.text(0.01, 1 - 0.18 / height, _title(report), size=12, weight="bold", va="top", parse_math=False)
    figure.text(0.01, 0.1 / height, "\n".join(_plain(n, 240) for n in notes[:2]), size=7, va="bottom", parse_math=False)
    _draw_legend(figure, axes, timeline, 0.55 / height)


def _rows(timeline: Timeline) -> Iterator[_Row]:
    shown: set[tuple[int, int]] = set()
    for lane in timeline.lanes:
        key = lane.rank, lane.device
        if lane.kind is LaneKind.STREAM and key not in shown:
            shown.add(key)
            if len(timeline.exposed.get(key, ())):
                yield _Row("exposed", lane.rank, None, 0, timeline.exposed[key])
        for row in range(lane.rows):
            yield _Row(_cut(lane.name, 22) if row == 0 else "", lane.rank, lane, row, None)


def _draw_row(axes: Axes, timeline: Timeline, row: _Row, place: int) -> None:
    if place % 2:
        axes.axhspan(place - 0.5, place + 0.5, color=_SCHEME.stripe, lw=0, zorder=0)
    if row.lane is None:
        bars = _bars(timeline, row.times[:, 0], row.times[:, 1])
        axes.broken_barh(bars, (place - 0.35, 0.7), facecolors=_SCHEME.exposed, edgecolors=_SCHEME.exposed, lw=0.6)
        return
    first, last = timeline.view
    events = row.lane.events
    events = events[(events["row"] == row.row) & (events["end"] >= first) & (events["start"] <= last)]
    _draw_names(axes, timeline, row.lane, events, place)
    for code, look in enumerate(_looks()):
        mine = events[events["role"] == code]
        if len(mine):
            bars = _bars(timeline, mine["start"], mine["end"])
            _draw_bars(axes, bars, place, look, faint=row.lane.kind is LaneKind.HOST)


def _draw_bars(axes: Axes, bars: list[tuple[float, float]], place: int, look: Look, *, faint: bool) -> None:
    span = (place - 0.4, 0.8)
    face = (look.light, 0.22) if faint else look.light
    axes.broken_barh(bars, span, facecolors=face, edgecolors=look.light, lw=0.5, zorder=2)
    if not faint and look.pattern in _HATCHES:
        hatch = _HATCHES[look.pattern]
        axes.broken_barh(bars, span, facecolors="none", edgecolors=_SCHEME.background, lw=0, hatch=hatch, zorder=3)


def _draw_names(axes: Axes, timeline: Timeline, lane: Lane, events: Any, place: int) -> None:
    """Names in the bars that have room for one."""
    first, last = timeline.view
    room = (last - first) // 20
    long = events[
        (events["end"].clip(first, last) - events["start"].clip(first, last) >= room) & (events["count"] == 1)
    ]
    for start, end, name, code in long[["start", "end", "name", "role"]].tolist():
        left, right = _in_unit(timeline, (max(start, first), min(end, last)))
        text = _cut(
            timeline.names[name] if name >= 0 else "", (min(end, last) - max(start, first)) * 150 // (last - first)
        )
        look = _looks()[code]
        ground = None if lane.kind is LaneKind.HOST else {"facecolor": look.light, "lw": 0, "pad": 0.6}
        ink = _SCHEME.ink if lane.kind is LaneKind.HOST else ink_on(look.light)
        axes.text(
            (left + right) / 2, place, text, size=7, color=ink,
            ha="center", va="center", zorder=4, clip_on=True, parse_math=False, bbox=ground,
        )  # fmt: skip


def _draw_axis(axes: Axes, timeline: Timeline, rows: list[_Row]) -> None:
    labels, rank = [], None
    for row in rows:
        labels.append(f"rank {row.rank}   {row.label}" if row.rank != rank else row.label)
        rank = row.rank
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_SCHEME.exposed if row.lane is None else _SCHEME.ink)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=_SCHEME.faint, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time since the trace's start, {_unit(timeline)[0]}", fontsize=9)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    changes = [place for place in range(1, len(rows)) if rows[place].rank != rows[place - 1].rank]
    axes.hlines([place - 0.5 for place in changes], *axes.get_xlim(), color=_SCHEME.faint, lw=0.8)


def _draw_iterations(axes: Axes, timeline: Timeline) -> None:
    """Where iterations begin, numbered above as far as the numbers have room."""
    first, last = timeline.view
    seen = [one for one in timeline.iterations if first <= one.start <= last]
    if not seen:
        return
    starts = [_in_unit(timeline, (one.start, one.end))[0] for one in seen]
    if len(seen) <= 200:
        axes.vlines(starts, *axes.get_ylim(), color=_SCHEME.faint, lw=0.7, linestyle=(0, (3, 3)), zorder=1)
    above = axes.secondary_xaxis("top")
    numbered = list(_apart(seen, starts, (axes.get_xlim()[1] - axes.get_xlim()[0]) / 36))
    above.set_xticks([at for _, at in numbered], [str(one.number) for one, _ in numbered], fontsize=7)
    above.set_xlabel("iteration", fontsize=8)


def _apart(seen: list[IterationSpan], starts: list[float], least: float) -> Iterator[tuple[IterationSpan, float]]:
    free = float("-inf")
    for one, at in sorted(zip(seen, starts, strict=True), key=lambda pair: pair[1]):
        if at >= free:
            free = at + least
            yield one, at


def _draw_legend(figure: Figure, axes: Axes, timeline: Timeline, bottom: float) -> None:
    from matplotlib.patches import Patch

    present = {int(code) for lane in timeline.lanes for code in set(lane.events["role"].tolist())}
    names = [*(role.value for role in ROLE_ORDER), "host range"]
    items = [
        Patch(
            facecolor=look.light if look.pattern != "outline" else (look.light, 0.22), label=names[code],
            edgecolor=_SCHEME.background if look.pattern in _HATCHES else look.light, hatch=_HATCHES.get(look.pattern),
        )
        for code, look in enumerate(_looks())
        if code in present
    ]  # fmt: skip
    items += [Patch(color=_SCHEME.exposed, label="exposed")] if any(map(len, timeline.exposed.values())) else []
    if items:
        figure.legend(
            handles=items, loc="center", ncols=len(items), fontsize=8, frameon=False, bbox_to_anchor=(0.5, bottom)
        )


def _bars(timeline: Timeline, start: Any, end: Any) -> list[tuple[float, float]]:
    size = _unit(timeline)[1]
    return list(zip(((start - timeline.first) / size).tolist(), ((end - start) / size).tolist(), strict=True))


def _in_unit(timeline: Timeline, times: tuple[int, int]) -> tuple[float, float]:
    size = _unit(timeline)[1]
    return (times[0] - timeline.first) / size, (times[1] - timeline.first) / size


def _unit(timeline: Timeline) -> tuple[str, int]:
    span = timeline.view[1] - timeline.first
    return next((unit for unit in _UNITS if span >= 2 * unit[1]), _UNITS[-1])


def _looks() -> list[Look]:
    return [*(ROLES[Role(role)] for role in ROLE_ORDER), RANGE]


def _title(report: TraceReport) -> str:
    only = f", {report.selection}" if report.selection else ""
    return _plain(f"{report.source} ({report.form}){only}", 150)


def _cut(text: str, most: int) -> str:
    shown = _plain(text[: most + 1], most + 1)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def _plain(text: str, most: int) -> str:
    """Text that any font has the letters of."""
    return inert(text, most).replace("…", "...").encode("ascii", "backslashreplace").decode()
