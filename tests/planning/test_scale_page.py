"""What the documentation says of planning at scale is a whole table with a picture that can be read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from benchmarks.planner_scale import POLICIES, RANKS, table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_has_every_number_of_ranks() -> None:
    lines = (DOCS / "planner_scale.md").read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    assert [int(row[0]) for row in rows[2:]] == list(RANKS)
    assert {len(row) for row in rows} == {len(rows[0])}
    for row in rows[2:]:
        bound, *reached = (float(cell) for cell in row[2 : 3 + len(POLICIES)])
        assert max(reached) <= bound + 1e-4


def test_the_picture_is_one() -> None:
    assert ElementTree.parse(DOCS / "planner_scale.svg").getroot().tag.endswith("svg")


def test_a_page_of_one_row() -> None:
    row = {"ranks": 8, "slots": 16, "bound": 1.0, "moved": 0.25}
    for policy in POLICIES:
        row |= {policy: 0.5, f"{policy} ms": 3.0, f"{policy} slower": 1.5}
    page = table([row], 7)
    assert page.endswith("| 8 | 16 | 1.0000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 3.0 | 3.0 | 3.0 | 25.0% |\n")
    assert "--seed 7" in page
    assert "1.5 times" in page
