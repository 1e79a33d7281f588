from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario

WITH_UNKNOWN_KEYS = "{ranks: 2, sed: 1, model: {layers: 1, experts: 2, top_k: 1}, checks: {leeks: true}}"


def test_the_schema_names_every_key() -> None:
    schema = scenarios.json_schema()
    assert set(schema["properties"]) == set(Scenario.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["ranks", "model"]
    assert "start_iter" in str(schema["$defs"]["CallStep"])
    assert unknown_keys(yaml_source.load(WITH_UNKNOWN_KEYS, "x").data, schema) == {"sed", "leeks"}


def unknown_keys(data: Any, schema: dict[str, Any]) -> set[str]:
    """Keys of `data` that the schema has no room for (a walk over properties, references and alternatives)."""
    return set(_unknown(data, schema, schema))


def _unknown(data: Any, node: dict[str, Any], root: dict[str, Any]) -> list[str]:
    if "$ref" in node:
        return _unknown(data, root["$defs"][node["$ref"].rsplit("/", 1)[1]], root)
    choices = [choice for kind in ("anyOf", "oneOf") for choice in node.get(kind, [])]
    if choices:
        return min(
            (_unknown(data, choice, root) for choice in choices if _fits(data, choice, root)), key=len, default=["?"]
        )
    if isinstance(data, list):
        return [key for item in data for key in _unknown(item, node["items"], root)]
    if not isinstance(data, dict):
        return []
    properties, rest = node.get("properties", {}), node.get("additionalProperties", False)
    found = [str(key) for key in data if key not in properties and rest is False]
    inner = [(value, properties.get(key, rest)) for key, value in data.items()]
    return found + [key for value, part in inner if isinstance(part, dict) for key in _unknown(value, part, root)]


def _fits(data: Any, node: dict[str, Any], root: dict[str, Any]) -> bool:
    node = root["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
    if "enum" in node:
        return data in node["enum"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    return "type" not in node or isinstance(data, kinds.get(node["type"], object))


FOLDER = Path(__file__).resolve().parents[2] / "scenarios"
SHIPPED = sorted(path for path in FOLDER.rglob("*.yaml") if "data" not in path.parts)


def shipped(test: Any) -> Any:
    return pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))(test)


def test_scenarios_are_shipped() -> None:
    assert {"quickstart", "static", "dynamic"} <= {path.stem for path in SHIPPED}
    assert len({path.stem for path in SHIPPED}) == len(SHIPPED) >= 40


@shipped
def test_a_shipped_scenario_loads_and_keeps_to_the_schema(path: Path) -> None:
    scenario = scenarios.load(path)
    assert scenario.description
    assert scenario.name == path.stem
    assert scenarios.loads(scenarios.dump(scenario), "x") == scenario
    assert unknown_keys(yaml_source.load(path.read_text(), "x").data, scenarios.json_schema()) == set()


@shipped
def test_a_shipped_scenario_is_short_and_says_what_it_proves(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("# Proves ")


def test_static_and_dynamic_have_the_same_workload() -> None:
    static, dynamic = (scenarios.load(FOLDER / f"{name}.yaml") for name in ("static", "dynamic"))
    assert static.balancer_off_reason() is not None
    assert dynamic.balancer_off_reason() is None
    keep = {"name", "description", "balancer", "checks"}
    assert static.model_dump(exclude=keep) == dynamic.model_dump(exclude=keep)
    assert static.slots == dynamic.slots


def test_illegal_calls_end_where_their_error_is_expected() -> None:
    calls = [scenarios.load(path) for path in SHIPPED if path.parent.name == "calls"]
    illegal = [s for s in calls if s.expect_error is not None]
    assert len(illegal) >= 14
    assert len(calls) - len(illegal) >= 5
    for scenario in illegal:
        assert scenario.expect_error is not None
        assert scenario.calls is not None
        assert scenario.expect_error.at == len(scenario.calls) - 1, scenario.name


JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        10**30,
        1.5,
        float("nan"),
        "",
        "on",
        "x",
        [],
        [1],
        {},
        {"a": 1},
        {1: 2},
        [[1]],
        {"call": "route"},
    ]
)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_edited_scenarios_lead_to_a_scenario_error_or_load(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(SHIPPED))
    content = yaml_source.load(path.read_text(), "x").data
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(content, data)
    check_loading(yaml_source.dump(content), path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_scenario_texts_lead_to_a_scenario_error_or_load(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(SHIPPED))
    text = path.read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 8))
        text = text[:start] + data.draw(st.text("[]{}:,-&*!|>#'\" \n\t09az\x00é", max_size=4)) + text[end:]
    check_loading(text, path)


def mutate(node: Any, data: st.DataObject) -> None:
    """Delete, replace or add something somewhere in a tree."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = data.draw(st.sampled_from(keys))
    action = data.draw(st.sampled_from(["deeper", "deeper", "delete", "replace", "add", "swap"]))
    if action == "deeper" and isinstance(node[key], dict | list):
        mutate(node[key], data)
    elif action == "delete":
        del node[key]
    elif action == "add" and isinstance(node, dict):
        node[data.draw(st.sampled_from(["config", "path", "call", "x", 0, "initial_global_assignments"]))] = data.draw(
            JUNK
        )
    elif action == "swap":
        node[key] = copy.deepcopy(node[data.draw(st.sampled_from(keys))])
    else:
        node[key] = copy.deepcopy(data.draw(JUNK))


def check_loading(text: str, path: Path) -> None:
    try:
        scenario = scenarios.loads(text, str(path))
    except ScenarioError:
        return
    assert scenarios.loads(scenarios.dump(scenario), "x") == scenario
