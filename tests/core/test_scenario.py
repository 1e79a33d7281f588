from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Balancer, CallStep, Model, Scenario

BASE = """\
ranks: 2
iterations: 12
model: {layers: 4, experts: 16, top_k: 2}
workload: {kind: zipf}
balancer: {num_slots: 20, layer_updates_per_iter: 2}
"""


def load(text: str = BASE, *overrides: str) -> Scenario:
    return scenarios.loads(text, "x.yaml", overrides)


def refused(text: str = BASE, *overrides: str) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        load(text, *overrides)
    return caught.value


def test_what_is_left_out_has_its_default() -> None:
    scenario = load()
    assert (scenario.name, scenario.seed, scenario.timeout_s, scenario.dispatch) == ("x", 0, 60.0, "alltoall")
    assert (scenario.model.hidden, scenario.model.backend, scenario.workload.tokens_per_rank) == (64, "wide_ep", 64)
    assert scenario.balancer == Balancer(num_slots=20, layer_updates_per_iter=2)


def test_a_scenario_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().ranks = 3  # type: ignore[misc]


def test_rules_hold_without_a_file_too() -> None:
    with pytest.raises(ValidationError, match="do not fit together"):
        Scenario(ranks=2, model=Model(layers=1, experts=2, top_k=3))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (20, 10)),
        (["balancer.num_slots=null", "balancer.slots_per_rank=9"], (18, 9)),
        (["balancer=null"], (16, 8)),
        (["balancer=null", "ranks=3"], (18, 6)),
        (["balancer=null", "model.backend=fused"], (32, 16)),
    ],
)
def test_slots(overrides: list[str], expected: tuple[int, int]) -> None:
    scenario = load(BASE, *overrides)
    assert (scenario.slots, scenario.slots_per_rank) == expected


@pytest.mark.parametrize(
    ("overrides", "path"),
    [([], "gathered"), (["dispatch=allgather"], "local_ids"), (["statistics=local_ids"], "local_ids")],
)
def test_statistics_follow_the_dispatch(overrides: list[str], path: str) -> None:
    assert load(BASE, *overrides).statistics_path == path


def test_the_reorder_seed_is_the_seed_unless_given() -> None:
    assert load(BASE, "seed=7").effective_reorder_seed == 7
    assert load(BASE, "seed=7", "reorder_seed=0").effective_reorder_seed == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["balancer=null"], "no balancer section"),
        (["balancer.layer_updates_per_iter=0"], "static routing"),
        (["ranks=1"], "one rank"),
        (["balancer=null", "model.backend=grouped"], "'grouped'"),
    ],
)
def test_a_balancer_that_is_off_says_why(overrides: list[str], reason: str) -> None:
    assert reason in str(load(BASE, *overrides).balancer_off_reason())


@pytest.mark.parametrize("overrides", [[], ["ranks=1", "calls=[start_iter]"]])
def test_a_balancer_that_is_on_has_no_reason_to_be_off(overrides: list[str]) -> None:
    assert load(BASE, *overrides).balancer_off_reason() is None


ONE_LAYER = ["model.layers=1", "balancer.layer_updates_per_iter=1"]
ASSIGNED = "balancer.initial_global_assignments="
RULES = [
    (["model.top_k=17"], "x.yaml", "17 is more than the 16 experts"),
    (["model.backend=fused"], "x.yaml", "cannot have a balancer"),
    (["model.routing.method=default"], "x.yaml", "the router has no say"),
    (["balancer.num_slots=21"], "x.yaml", "num_slots: 20 is the nearest"),
    (["balancer.num_slots=23", "ranks=4"], "x.yaml", "num_slots: 24 is the nearest"),
    (["balancer.num_slots=14"], "x.yaml", "14 slots cannot hold 16 experts"),
    (["balancer.num_slots=null"], "x.yaml", "slots_per_rank: 8 is the fewest"),
    (["balancer.slots_per_rank=10"], "x.yaml", "not both"),
    (ONE_LAYER, "x.yaml", "commit_delay: 2"),
    (["iterations=1"], "x.yaml", "nothing can move in 1 iterations"),
    (["balancer.warm_up=11"], "x.yaml", "iterations: 13 or more"),
    (["balancer.update_timeout_s=60"], "x.yaml", "smaller than timeout_s"),
    (["statistics=gathered", "dispatch=allgather"], "x.yaml", "only 'alltoall' has"),
    (["statistics=global_ids"], "x.yaml", "only with dispatch 'allgather'"),
    (["workload.kind=uniform", "workload.skew=2.0"], "x.yaml", "'skew' has no effect"),
    (["workload.hot_share=0.1"], "x.yaml", "'hot_share' has no effect"),
    (["workload.kind=hot", "workload.hot_experts=17"], "x.yaml", "17 hot experts of only 16"),
    (["workload.kind=recorded"], "x.yaml", "needs the path of its file"),
    (["workload.tokens_per_rank=[1, 2, 3]"], "x.yaml", "3 numbers of tokens for 2 ranks"),
    (["workload.tokens_per_rank=[0, 0]"], "x.yaml", "no rank has any token"),
    (["expect_error={code: E101}"], "x.yaml", "an error is expected of 'calls'"),
    (["calls=[start_iter]", "balancer=null"], "x.yaml", "calls need a balancer"),
    (["calls=[{route: {layer: 4}}]"], "x.yaml", "layer 4 of only 4 layers"),
    (["calls=[start_iter]", "expect_error={code: E101, at: 1}"], "x.yaml", "call 1 is expected to fail"),
    ([ASSIGNED + "{0: [0]}"], "x.yaml", "layers without an assignment: 1, 2, 3"),
    ([*ONE_LAYER, "balancer.commit_delay=2", ASSIGNED + "{0: [0, 1]}"], "x.yaml", "assigns 2 slots, there are 20"),
    ([*ONE_LAYER, "balancer.commit_delay=2", ASSIGNED + "{0: [16]}"], "x.yaml", "there are no experts 16"),
    ([*ONE_LAYER, "balancer.commit_delay=2", ASSIGNED + "{0: [0]}"], "x.yaml", "no slot for experts 1, 2, 3, 4, 5 and"),
    ([ASSIGNED + "{4: [0]}"], "x.yaml", "there is no layer 4"),
]


@pytest.mark.parametrize(("overrides", "where", "message"), RULES)
def test_parts_that_do_not_fit_together(overrides: list[str], where: str, message: str) -> None:
    error = refused(BASE, *overrides)
    assert error.code == "E032"
    assert message in str(error)
    assert where in error.where or "override" in error.where


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ("{groups: 2}", "'groups' has no effect with routing 'renormalize'"),
        ("{method: deepseek_v3, groups: 3}", "3 groups do not divide 16 experts"),
        ("{method: deepseek_v3, groups: 4, top_groups: 5}", "top_groups 5 of only 4 groups"),
        ("{method: deepseek_v3, groups: 16, top_groups: 1}", "groups that hold only 1"),
        ("{method: deepseek_v3, groups: 16, top_groups: 4}", "scored by its two best experts"),
    ],
)
def test_routing_groups(routing: str, message: str) -> None:
    error = refused(BASE, "workload.kind=model", f"model.routing={routing}")
    assert (error.code, message in str(error)) == ("E032", True)


@pytest.mark.parametrize(
    ("text", "code", "where", "message"),
    [
        (BASE.replace("ranks: 2", "rank: 2\nranks: 2"), "E030", "x.yaml:1:1", "did you mean 'ranks'?"),
        (BASE.replace("layers: 4", "layrs: 4, layers: 4"), "E030", "x.yaml:3:9", "did you mean 'layers'?"),
        (BASE.replace("ranks: 2\n", ""), "E031", "x.yaml:1:1", "'ranks' is missing"),
        (BASE.replace("ranks: 2", "ranks: on"), "E031", "x.yaml:1:8", "valid integer, not 'on'"),
        (BASE.replace("ranks: 2", "ranks: 2.0"), "E031", "x.yaml:1:8", "valid integer"),
        (BASE.replace("ranks: 2", "ranks: 65"), "E031", "x.yaml:1:8", "less than or equal to 64"),
        (BASE.replace("zipf", "zpif"), "E031", "x.yaml:4:18", "did you mean 'zipf'?"),
        (BASE.replace("zipf", "zipf, skew: .nan"), "E031", "x.yaml:4:30", "finite number"),
        (BASE.replace("zipf", "zipf, tokens_per_rank: [1, x]"), "E031", "x.yaml:4:45", "workload.tokens_per_rank.1"),
        (BASE + "checks: {leaks: yes}", "E031", "x.yaml:6:17", "valid boolean, not 'yes'"),
        (BASE + "checks: {thresholds: {commits: 3}}", "E031", "x.yaml:6:32", "valid string"),
        (BASE + "checks: {thresholds: {commits: '3'}}", "E035", "x.yaml:6:32", "does not parse"),
        (BASE + "checks: {thresholds: {comits: '> 3'}}", "E036", "x.yaml:6:31", "did you mean 'commits'?"),
        (BASE + "calls: [start_itr]", "E031", "x.yaml:6:9", "did you mean 'start_iter'?"),
        (BASE + "calls: [{route: {layr: 0}}]", "E030", "x.yaml:6:9", "did you mean 'layer'?"),
        (BASE + "calls: [{route: 1}]", "E031", "x.yaml:6:9", "a name or one name with its arguments"),
        (BASE + "calls: [{route: {}, start_iter: {}}]", "E031", "x.yaml:6:9", "one name with its arguments"),
        (BASE + "calls: [7]", "E031", "x.yaml:6:9", "a name or one name with its arguments"),
        (BASE + "expect_error: {code: X1}", "E031", "x.yaml:6:22", "pattern"),
        ("- 1\n", "E025", "x.yaml", "mapping"),
        ("3: 4\n" + BASE, "E031", "x.yaml:1:1", "3"),
    ],
)
def test_bad_values_are_refused_with_their_place(text: str, code: str, where: str, message: str) -> None:
    error = refused(text)
    assert error.code == code
    assert error.where == where
    assert message in str(error)


def test_all_problems_are_reported_at_once() -> None:
    error = refused(BASE.replace("ranks: 2", "ranks: 0").replace("top_k: 2", "top_k: x").replace("kind", "knd"))
    assert error.what == "3 problems"
    lines = [line.strip() for line in error.why.splitlines()]
    assert [line.split(": ")[0] for line in lines] == ["x.yaml:1:8", "x.yaml:3:39", "x.yaml:4:12"]


def test_calls_may_be_names_or_names_with_arguments() -> None:
    scenario = load(BASE + "calls: [start_iter, {update_local_statistic: {layer: 1, last: false}}, {end_iter: null}]")
    assert scenario.calls == (
        CallStep(call="start_iter"),
        CallStep(call="update_local_statistic", layer=1, last=False),
        CallStep(call="end_iter"),
    )


def test_overrides_replace_add_and_remove() -> None:
    scenario = load(
        BASE, "model.layers=6", "seed=3", "balancer.initial_global_assignments=", "record.topk_ids=true",
        "checks.thresholds.overlap.balancer=p50 >= 0.5", "workload.tokens_per_rank=[3, 4]",
    )  # fmt: skip
    assert (scenario.model.layers, scenario.seed, scenario.record.topk_ids) == (6, 3, True)
    assert scenario.checks.thresholds == {"overlap.balancer": "p50 >= 0.5"}
    assert scenario.workload.tokens_per_rank == (3, 4)
    assert load(BASE + "calls: [start_iter, route]", "calls.1=end_iter").calls == (
        CallStep(call="start_iter"),
        CallStep(call="end_iter"),
    )


@pytest.mark.parametrize("override", ["ranks", "=3", "model.layers.deep=3", "calls.0=route", "model.0.x=1"])
def test_overrides_that_lead_nowhere(override: str) -> None:
    assert refused(BASE, override).code in ("E030", "E031", "E033")


def test_a_bad_override_is_its_own_place() -> None:
    error = refused(BASE, "model.layers=-1")
    assert error.where == "override 'model.layers=-1'"


def test_overrides_leave_the_text_alone() -> None:
    document = yaml_source.load(BASE, "x")
    before = copy.deepcopy(document.data)
    from moe_eplb.core import scenario_overrides

    changed = scenario_overrides.apply(document, ["model.layers=9", "record.loads=false"])
    assert document.data == before
    assert changed.data["model"]["layers"] == 9


def test_a_dump_holds_everything_and_loads_back_equal() -> None:
    scenario = load(BASE + "calls: [start_iter, {route: {layer: 1}}]\nname: '1e3'\ndescription: 'on'")
    text = scenarios.dump(scenario)
    assert scenarios.loads(text, "another_name.yaml") == scenario
    assert set(yaml_source.load(text, "x").data) >= {"seed", "timeout_s", "dispatch", "checks", "record"}


def test_the_schema_names_every_key() -> None:
    schema = scenarios.json_schema()
    assert set(schema["properties"]) == set(Scenario.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["ranks", "model"]
    assert "start_iter" in str(schema["$defs"]["CallStep"])
    assert unknown_keys(yaml_source.load(BASE + "sed: 1\nchecks: {leeks: true}", "x").data, schema) == {"sed", "leeks"}


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


# -- the files we ship ---------------------------------------------------------------------------------------------------

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


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_edited_scenarios_lead_to_a_scenario_error_or_load(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(SHIPPED))
    content = yaml_source.load(path.read_text(), "x").data
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(content, data)
    check_loading(yaml_source.dump(content), path)


@settings(max_examples=150, deadline=None)
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
        node[key] = data.draw(JUNK)


def check_loading(text: str, path: Path) -> None:
    try:
        scenario = scenarios.loads(text, str(path))
    except ScenarioError as error:
        assert error.what, "an error says what happened"  # noqa: PT017
        return
    assert scenarios.loads(scenarios.dump(scenario), "x") == scenario
