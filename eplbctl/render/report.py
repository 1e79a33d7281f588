"""A whole report, of a run folder or of any trace, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from eplbctl.render import capture, run_tables, tables
from eplbctl.render.capture_json import document

if TYPE_CHECKING:
    from moe_eplb.analysis.report import Report

__all__ = ["json_text", "markdown", "text"]


def text(report: Report) -> str:
    """What was read, all tables, and what a reader must know before believing them."""
    heading = [capture.heading(report.trace)] if report.trace is not None else []
    return "\n\n".join([*heading, *tables.text(_tables(report)), *_remarks(report)])


def markdown(report: Report) -> str:
    """The same for a pull request or a log book."""
    heading = [capture.heading(report.trace)] if report.trace is not None else []
    return tables.markdown_page(report.name, heading, _tables(report), _remarks(report))


def json_text(report: Report) -> str:
    """The report's own fields: those of the run if there was one, and ``trace``."""
    found: dict[str, Any] = {"schema": 1, "name": report.name}
    if report.run is not None:
        found |= asdict(report.run)
    found["trace"] = document(report.trace, report.measures.single) if report.trace is not None else None
    return json.dumps(found, indent=2)


def _tables(report: Report) -> Iterator[tables.Table]:
    if report.run is not None:
        yield from run_tables.tables(report.run)
    if report.trace is not None:
        yield from capture.tables(report.trace)
    elif report.limits:
        yield capture.check_rows(report.limits)


def _remarks(report: Report) -> Iterator[str]:
    """Each once: a run and its trace can lack the same."""
    found = dict.fromkeys(run_tables.remarks(report.run)) if report.run is not None else {}
    if report.trace is not None:
        found |= dict.fromkeys(capture.remarks(report.trace))
    yield from found
    if report.beside:
        yield f"Kernels and calls of the driver: eplbctl report {' '.join(report.beside)}"
