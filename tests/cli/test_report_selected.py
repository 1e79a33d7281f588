"""``eplbctl report`` on iterations that not every rank has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import Call

ROOT = Path(__file__).resolve().parents[2]
SHORTER = str(ROOT / "traces" / "bad_captures" / "complete-iteration_missing_on_a_rank.nsys.sqlite.gz")
"""Rank 0 has the iterations 0 to 2, rank 1 the first two of them."""


def test_a_rank_without_the_selected_iteration_is_named_and_has_no_idle_time(call: Call) -> None:
    trace = json.loads(call("report", SHORTER, "--iterations", "2", "--format", "json").out)["trace"]
    assert (trace["ranks"], trace["gpus"]) == ([0, 1], 1)
    (row,) = trace["idle"]
    assert row["rank"] == 0
    assert trace["metrics"]["idle.share"] == row["idle_ns"] / row["span_ns"] < 1
    assert trace["unmatched_collectives"] > 0
    assert "rank 1: no device event of the selection" in call("report", SHORTER, "--iterations", "2").out


@pytest.mark.parametrize(("option", "said"), [(("--layer", "0"), True), (("--iterations", "0-1"), False)])
def test_it_says_what_is_not_told_apart_by_layer(call: Call, option: tuple[str, str], said: bool) -> None:
    answer = call("report", SHORTER, *option, "--fail-if", "idle.share > 0.9").out
    assert ("are of all layers" in answer) == said
    assert (re.search(r"^limit idle.share +unknown", answer, re.MULTILINE) is not None) == said
