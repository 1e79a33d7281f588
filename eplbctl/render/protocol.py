"""The table of the call order as text, Markdown or JSON."""

from __future__ import annotations

import json

from eplbctl.render.text import table
from moe_eplb.core.protocol import TABLE
from moe_eplb.core.protocol_iteration import ITERATION_ROWS

__all__ = ["json_text", "markdown", "text"]

_HEADERS = ("call", "needs", "error", "when it is missing", "hint")
_ITERATION = "(iteration)"


def text() -> str:
    """A table of calls, needs and codes; what each code means below it."""
    rows = [row[:3] for row in _rows()]
    meaning = {code: (reason, hint) for _, _, code, reason, hint in _rows()}
    lines = [f"{code}  {reason}\n      {hint}" for code, (reason, hint) in sorted(meaning.items())]
    return "\n\n".join([table(_HEADERS[:3], rows), "\n".join(lines)])


def markdown() -> str:
    """One table with everything."""
    return table(_HEADERS, _rows(), style="github")


def json_text() -> str:
    """A list of objects."""
    keys = ("call", "needs", "code", "reason", "hint")
    return json.dumps([dict(zip(keys, row, strict=True)) for row in _rows()], indent=2)


def _rows() -> list[tuple[str, str, str, str, str]]:
    calls = [(call.name.lower(), row) for call, needed in TABLE.items() for row in needed]
    iterations = [(_ITERATION, row) for row in ITERATION_ROWS.values()]
    return [(name, row.needs, row.code, row.reason, row.hint) for name, row in calls + iterations]
