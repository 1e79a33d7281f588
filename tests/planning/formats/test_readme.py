"""The tables of formats in the README are those of the registry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path

import pytest

from moe_eplb.planning.formats.facets import NEVER_KEPT, Held, HeldSlots
from moe_eplb.planning.formats.registry import LOADS, PLACEMENTS

README = Path(__file__).resolve().parents[3] / "README.md"


def _short(facets: Iterable[Enum]) -> str:
    return ", ".join(facet.name.lower().replace("_", " ") for facet in facets) or "-"


def of_loads() -> Iterator[str]:
    """The rows of the table of loads."""
    for name, form in LOADS.items():
        lacks = [facet for facet in Held if facet not in form.holds | NEVER_KEPT]
        left_out = [facet for facet in Held if facet in form.holds & NEVER_KEPT]
        written = "yes" if form.write else "no"
        yield f"| `{name}` | {form.whose}: {form.what} | {written} | {_short(lacks)} | {_short(left_out)} |"


def of_placements() -> Iterator[str]:
    """The rows of the table of placements."""
    for name, form in PLACEMENTS.items():
        lacks = [facet for facet in HeldSlots if facet not in form.holds]
        yield f"| `{name}` | {form.whose}: {form.what} | {_short(lacks)} |"


@pytest.mark.parametrize("rows", [of_loads, of_placements])
def test_the_tables_are_those_of_the_program(rows: object) -> None:
    assert callable(rows)
    assert "\n".join(rows()) + "\n\n" in README.read_text(encoding="utf-8")


def test_every_word_of_the_tables_is_explained() -> None:
    text = " ".join(README.read_text(encoding="utf-8").split())
    for facet in (*Held, *HeldSlots):
        assert f"*{_short([facet])}*" in text, facet
