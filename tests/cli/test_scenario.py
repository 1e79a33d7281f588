"""``eplbctl scenario``: what it writes it accepts, and what it shows is the same scenario."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eplbctl.commands.scenario import TEMPLATES
from moe_eplb.core import scenario as scenarios

from .conftest import SMALL, Call, Write


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_good_scenarios(template: str, call: Call) -> None:
    answer = call("scenario", "init", "mine.yaml", "--template", template)
    assert (answer.code, answer.out) == (0, "wrote mine.yaml\n")
    assert answer.err == "next: eplbctl run mine.yaml\n"
    checked = call("scenario", "check", "mine.yaml")
    assert checked.code == 0
    assert checked.out.startswith("mine.yaml: good")
    assert len(Path("mine.yaml").read_text().splitlines()) <= 60


def test_init_never_overwrites_unless_told(call: Call) -> None:
    Path("scenario.yaml").write_text("precious")
    assert call("scenario", "init").code == 2
    assert Path("scenario.yaml").read_text() == "precious"
    assert call("scenario", "init", "--force").code == 0
    assert Path("scenario.yaml").read_text() != "precious"


def test_check_says_when_the_balancer_is_off(call: Call, write: Write) -> None:
    text = SMALL.replace("layer_updates_per_iter: 1", "layer_updates_per_iter: 0")
    out = call("scenario", "check", write("static", text)).out
    assert out == "scenarios/static.yaml: good (balancer: off, because static routing: layer_updates_per_iter is 0)\n"


def test_check_tells_the_place(call: Call, write: Write) -> None:
    path = write("bad", SMALL.replace("top_k: 2", "topk: 2"))
    answer = call("scenario", "check", path)
    assert (answer.code, answer.out) == (2, "")
    assert f"{path}:4:" in answer.err
    assert "top_k" in answer.err


def test_show_is_complete_and_equal(call: Call, write: Write) -> None:
    path = write()
    out = call("scenario", "show", path, "--set", "seed=7").out
    assert "commit_delay: 1" in out
    assert scenarios.loads(out, "shown") == scenarios.load(path, ["seed=7"])


def test_show_needs_just_one_scenario(call: Call, write: Write) -> None:
    Path("scenarios").mkdir()
    answer = call("scenario", "show", "scenarios")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E001]")
    write("one")
    assert call("scenario", "show", "scenarios").code == 0
    write("two")
    answer = call("scenario", "show", "scenarios")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error[E008]: scenarios holds 2 scenarios")


def test_list_names_and_describes(call: Call, write: Write) -> None:
    write("one")
    write("two", SMALL.replace("layer_updates_per_iter: 1", "layer_updates_per_iter: 0"))
    out = call("scenario", "list").out
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["one", "2", "4", "on", "a", "small", "one"],
        ["two", "2", "4", "off", "a", "small", "one"],
    ]
    data = json.loads(call("scenario", "list", "scenarios", "--format", "json").out)
    assert data[1] == {
        "name": "two", "ranks": 2, "iterations": 4, "balancer": "off", "description": "a small one",
        "path": "scenarios/two.yaml",
    }  # fmt: skip


def test_schema_is_json_schema(call: Call) -> None:
    schema = json.loads(call("scenario", "schema", "-o", "schema.json").out or Path("schema.json").read_text())
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"ranks", "model", "balancer", "checks"} <= schema["properties"].keys()
