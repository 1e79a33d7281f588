"""``eplbctl protocol``: what it prints is the table that the balancer asserts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from eplbctl.render.exploration import Searches, text
from moe_eplb.core.explore import CODES, explore, explore_iterations
from moe_eplb.core.protocol import TABLE, Call

from .conftest import Call as CommandLine

PAIRS = {(call.name.lower(), row.code) for call, rows in TABLE.items() for row in rows}


def test_show_has_every_row_of_the_table(call: CommandLine) -> None:
    rows = json.loads(call("protocol", "show", "--format", "json").out)
    assert {(row["call"], row["code"]) for row in rows} >= PAIRS
    assert {row["code"] for row in rows} == CODES


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_show_names_every_call_and_code(form: str, call: CommandLine) -> None:
    out = call("protocol", "show", "--format", form).out
    assert all(name in out for name in [stage.name.lower() for stage in Call] + sorted(CODES))


def test_explore_finds_the_protocol_sound(call: CommandLine) -> None:
    answer = call("protocol", "explore", "--format", "json", "--layers", 3)
    assert answer.code == 0
    data = json.loads(answer.out)
    assert [search["search"] for search in data["searches"]][-1] == "iterations, 3 layers"
    dynamic = data["searches"][0]
    assert dynamic["states"] == len(explore(dynamic=True).states)
    assert dynamic["violations"]["E103"] == ["update_local_statistic(is_first_stage=True, is_last_stage=True)"]
    iterations = data["searches"][2]["violations"]
    assert iterations["E123"] == ["start_iter()", "layer(layer=1)"]
    assert iterations["E126"] == ["start_iter(iteration=1)"]


def test_explore_prints_the_shortest_ways(call: CommandLine) -> None:
    out = call("protocol", "explore").out
    assert "  E102  done_wait_gpu_stage()\n" in out
    assert "Rules that no sequence can break: none" in out


def test_a_state_without_a_way_back_is_not_sound() -> None:
    good = {"dynamic": explore(dynamic=True), "iterations": explore_iterations(layers=2)}
    stuck = dataclasses.replace(good["dynamic"], stranded=frozenset(list(good["dynamic"].states)[:1]))  # type: ignore[type-var]
    assert not Searches(good | {"dynamic": stuck}).sound
    assert not Searches({"dynamic": good["dynamic"]}).sound, "the rules of iterations are never broken here"
    assert "E126" in text(Searches({"dynamic": good["dynamic"]}))
