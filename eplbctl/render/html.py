"""A report on a trace as one page that needs nothing else: no network, no fonts, no other file.

Scripts and styles stand in the page and are allowed by their digests, so that nothing a trace says can run. Names are
made visible by `eplbctl.render.inert`, escaped by the template, and as data they are JSON without a single ``<``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from eplbctl.render.capture import heading, remarks, tables
from eplbctl.render.inert import inert
from eplbctl.render.palette import RANGE, ROLES, SCHEMES, Look, ink_on
from eplbctl.render.tables import Table
from moe_eplb.analysis.capture import ROLES as ROLE_ORDER
from moe_eplb.analysis.selection import EVERYTHING, Selection
from moe_eplb.analysis.timeline import Timeline, make_timeline
from moe_eplb.analysis.timeline_data import timeline_data
from moe_eplb.core.events import Role
from moe_eplb.core.verdict import CheckResult, Status

if TYPE_CHECKING:
    from moe_eplb.analysis.capture import Capture
    from moe_eplb.analysis.exposed import Stretch
    from moe_eplb.analysis.trace_report import TraceReport

__all__ = ["cells", "digest", "page", "template"]

_SCRIPTS = ("report.data.js", "report.draw.js", "report.map.js", "report.js")
_MARKS = {Status.VALID: "✓", Status.UNKNOWN: "?", Status.INVALID: "✗"}
_NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?( ?%)?|-|")
_ELSEWHERE = ("Checks", "Overlap", "Longest exposed stretches of the balancer")
_LONG_TEXT = 20_000
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class _Cell(NamedTuple):
    text: str
    kind: str


def page(report: TraceReport, capture: Capture, title: str, selection: Selection = EVERYTHING) -> str:
    """The page.

    Args:
        report: What the tables say.
        capture: What is drawn, with roles; the report must be its own.
        title: Heading of the page, any text.
        selection: What the report was made for.
    """
    timeline = make_timeline(capture, selection)
    data = timeline_data(timeline, inert)
    style, script = template("report.css"), _script()
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    made = environment.from_string(template("report.html.j2")).render(
        title=inert(title), facts=_facts(report, timeline), warnings=_texts([report.incomplete]),
        notes=_texts(_remarks(report)), checks=_checks(report.checks),
        picture_notes=_texts(data.pop("notes")), stretches=_stretches(report.exposed, timeline),
        summary=cells(next((t for t in tables(report) if t.title == "Overlap"), None)),
        tables=[cells(t) for t in tables(report) if t.rows and t.title not in _ELSEWHERE],
        layers=cells(_layers(timeline)), map_note=timeline.heat.note, map_most=_most(timeline),
        has_balancer=report.pairs["balancer"].whole.total > 0,
        style=Markup(style), style_hash=digest(style), script=Markup(script), script_hash=digest(script),
        data=_json(data | _looks() | _marks(report.exposed, timeline) | {"asked": bool(report.selection)}),
    )  # fmt: skip
    return made


def _facts(report: TraceReport, timeline: Timeline) -> list[tuple[str, str]]:
    lines = heading(report).splitlines()
    facts = [
        ("source", report.source), ("format", report.form), ("contains", lines[0].rpartition("): ")[2]),
        ("ranks", f"{', '.join(map(str, report.ranks)) or 'none'} ({report.rank_source})"),
        ("reported", report.selection or "everything"), ("starts at", f"{timeline.first} ns of the trace's clock"),
    ]  # fmt: skip
    return [(name, inert(value, 2000)) for name, value in facts]


def _remarks(report: TraceReport) -> list[str]:
    return [text for text in remarks(report) if not text.startswith("Incomplete:")]  # said in a place of its own


def _texts(texts: Sequence[str]) -> list[str]:
    return [inert(text, 2000) for text in texts if text]


def _checks(checks: Sequence[CheckResult]) -> list[dict[str, str]]:
    return [
        {
            "name": inert(check.name), "status": check.status.value, "mark": _MARKS[check.status],
            "observed": inert(check.observed, 2000), "expected": inert(check.expected, 2000),
            "where": inert(check.where, 2000), "detail": inert(check.detail, _LONG_TEXT, keep="\n"),
        }
        for check in checks
    ]  # fmt: skip


def cells(part: Table | None) -> dict[str, Any] | None:
    """A table whose cells know whether they are numbers or names; None for one without rows."""
    if part is None or not part.rows:
        return None
    rows = [[_cell(value) for value in row] for row in part.rows]
    kinds = [
        "number" if all(cell.kind == "number" for cell in column) else "text" for column in zip(*rows, strict=True)
    ]
    heads = [_Cell(inert(head), kind) for head, kind in zip(part.headers, kinds, strict=True)]
    return {"title": part.title, "headers": heads, "rows": rows, "note": inert(part.note, 2000)}


def _cell(value: Any) -> _Cell:
    text = inert("" if value is None else str(value), 2000)
    return _Cell(text, "number" if _NUMBER.fullmatch(text) else "name" if len(text) > 24 else "text")


def _stretches(stretches: Sequence[Stretch], timeline: Timeline) -> list[dict[str, str]]:
    return [
        {
            "length": f"{one.length / 1e3:,.3f} us", "start": f"{(one.start - timeline.first) / 1e6:,.6f} ms",
            "rank": str(one.rank), "iteration": _number(one.iteration), "layer": _number(one.layer),
            "work": ", ".join(inert(name, 160) for name, _ in one.work[:3]),
            "ranges": " > ".join(inert(text, 160) for text in one.ranges) or "-",
        }
        for one in stretches
    ]  # fmt: skip


def _number(number: int) -> str:
    return str(number) if number >= 0 else "-"


def _marks(stretches: Sequence[Stretch], timeline: Timeline) -> dict[str, Any]:
    """The listed stretches, for the picture."""
    first = timeline.first
    marks = [
        {"rank": s.rank, "device": s.device, "start": s.start - first, "end": s.end - first} for s in stretches
    ]  # fmt: skip
    return {"stretches": marks}


def _layers(timeline: Timeline) -> Table:
    """The map's sums over iterations, for those who do not see it."""
    heat = timeline.heat
    rows = []
    for (first, last), total, exposed in zip(heat.layers, heat.total_ns, heat.exposed_ns, strict=True):
        whole, open_ns = sum(ns or 0 for ns in total), sum(ns or 0 for ns in exposed)
        worst, at = max((ns, -column) for column, ns in enumerate(exposed) if ns is not None)
        name = "none" if first < 0 else str(first) if first == last else f"{first} to {last}"
        share = f"{1 - open_ns / whole:.1%}" if whole else "-"
        where = _span(heat.iterations[-at]) if worst else "-"
        rows.append((name, f"{whole / 1e3:,.3f}", f"{open_ns / 1e3:,.3f}", share, f"{worst / 1e3:,.3f}", where))
    heads = ("layer", "all us", "exposed us", "hidden", "most exposed us", "in iteration")
    return Table("Exposed balancer work by layer", heads, rows)


def _span(numbers: tuple[int, int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[1] else f"{numbers[0]} to {numbers[1]}"


def _most(timeline: Timeline) -> str:
    return f"{max((ns or 0 for row in timeline.heat.exposed_ns for ns in row), default=0) / 1e3:,.3f} us"


@cache
def _looks() -> dict[str, Any]:
    """Colours and patterns in the order of the roles' codes; host ranges without a role come last."""
    looks = [_look(role.value, ROLES[Role(role)]) for role in ROLE_ORDER]
    return {
        "roles": [*looks, _look("range", RANGE)],
        "schemes": {name: scheme._asdict() for name, scheme in SCHEMES.items()},
    }


def _look(name: str, look: Look) -> dict[str, str]:
    return {"name": name, **look._asdict(), "light_ink": ink_on(look.light), "dark_ink": ink_on(look.dark)}


def _json(data: dict[str, Any]) -> Markup:
    """JSON in which no character means anything to HTML."""
    text = orjson.dumps(data).decode()
    return Markup(text.translate({ord(character): escape for character, escape in _UNSAFE.items()}))


def _script() -> str:
    return "(() => {\n'use strict';\n" + "".join(_scripts()) + "})();"


def _scripts() -> Iterator[str]:
    for name in _SCRIPTS:
        yield template(name)


def template(name: str) -> str:
    """A file that pages are made of."""
    return resources.files("eplbctl").joinpath("templates", name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    """How a page's own script or style is named in its Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
