"""Tables with titles, as plain text or Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from eplbctl.render.text import table

__all__ = ["Table", "escaped", "markdown", "markdown_page", "text"]

_AT_START = re.compile(r"^(\s*(?:[0-9]{1,9}(?=[.)]))?)([-+=#~.)])")
"""What begins a heading, a list or a rule at the start of a line."""


class Table(NamedTuple):
    """A table that has something to say only if it has rows; `note` stands below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def text(tables: Iterable[Table]) -> list[str]:
    """Every table that has rows, with its title above it."""
    return [_with_note(f"{t.title}\n{table(t.headers, t.rows)}", t) for t in tables if t.rows]


def markdown(tables: Iterable[Table]) -> list[str]:
    """The same under headings of the second level."""
    return [
        _with_note(
            f"## {t.title}\n\n{table(t.headers, _cells(t.rows), style='github')}",
            t._replace(note=escaped(t.note)),
            gap="\n\n",
        )
        for t in tables
        if t.rows
    ]


def markdown_page(title: str, above: Iterable[str], tables: Iterable[Table], below: Iterable[str]) -> str:
    """Tables under a heading of the first level, between texts; names in any of them may come from a trace."""
    parts = [f"# {escaped(title)}", *map(escaped, above), *markdown(tables), *map(escaped, below)]
    return "\n\n".join(parts)


def escaped(lines: str) -> str:
    """Text that Markdown shows as it is, line by line: names from a trace can begin an element, a picture or a list."""
    return "\n".join(_AT_START.sub(r"\1\\\2", _inert(line)) for line in lines.split("\n"))


def _with_note(text: str, of: Table, gap: str = "\n") -> str:
    return f"{text}{gap}{of.note}" if of.note else text


def _cells(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Names of kernels hold characters that would end a cell or begin an element."""
    return [[_inert(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]


def _inert(cell: str) -> str:
    for character in "\\`*_{}[]<>|&":
        cell = cell.replace(character, f"\\{character}")
    return cell.replace("\n", " ")
