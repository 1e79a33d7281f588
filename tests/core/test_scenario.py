from __future__ import annotations

import copy

import pytest
from pydantic import ValidationError

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import scenario_overrides, yaml_source
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
    [
        ([], "gathered"),
        (["dispatch=allgather"], "local_ids"),
        (["dispatch=symm_mem"], "local_ids"),
        (["statistics=local_ids"], "local_ids"),
        (["dispatch=allgather", "overlap=before"], "global_ids"),
    ],
)
def test_statistics_follow_the_dispatch(overrides: list[str], path: str) -> None:
    assert load(BASE, *overrides).statistics_path == path


def test_symmetric_memory_of_gpus_needs_all_ranks_of_the_pool() -> None:
    on_gpus = ["device=cuda", "dispatch=symm_mem"]
    assert load(BASE, *on_gpus).needs_all_ranks
    assert not load(BASE, *on_gpus, "ranks=1").needs_all_ranks
    assert not load(BASE, "dispatch=symm_mem").needs_all_ranks
    assert not load(BASE, "device=cuda").needs_all_ranks


def test_the_reorder_seed_is_the_seed_unless_given() -> None:
    assert load(BASE, "seed=7").effective_reorder_seed == 7
    assert load(BASE, "seed=7", "reorder_seed=0").effective_reorder_seed == 0
    assert load(BASE, "seed=7", "overlap=serial").stream_seed is None
    assert load(BASE, "seed=7", "dispatch=allgather", "overlap=before").stream_seed == 7


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


def test_experts_that_stay_may_be_fewer_than_ranks() -> None:
    assert load(BASE, "ranks=20", "balancer.layer_updates_per_iter=0").ranks == 20


ONE_LAYER = ["model.layers=1", "balancer.layer_updates_per_iter=1"]
ASSIGNED = "balancer.initial_global_assignments="
ONE_REDUCTION = ["balancer.reduction=iteration", "balancer.commit_delay=2", "statistics=local_ids"]
RULES = [
    (["model.top_k=17"], "x.yaml", "17 is more than the 16 experts"),
    (["model.backend=fused"], "x.yaml", "cannot have a balancer"),
    (["model.routing.method=default"], "x.yaml", "the router has no say"),
    (["balancer.num_slots=21"], "x.yaml", "num_slots: 20 is the nearest"),
    (["balancer.num_slots=23", "ranks=4"], "x.yaml", "num_slots: 24 is the nearest"),
    (["balancer.num_slots=14"], "x.yaml", "14 slots cannot hold 16 experts"),
    (["balancer.num_slots=null"], "x.yaml", "slots_per_rank: 8 is the fewest"),
    (["balancer.slots_per_rank=10"], "x.yaml", "not both"),
    (["ranks=20"], "x.yaml", "16 experts are too few for a balancer of 20 ranks"),
    (["ranks=20", "calls=[start_iter]"], "x.yaml", "experts: 20 or more"),
    (["ranks=20", "balancer.state=device", "balancer.weights_from=peer"], "x.yaml", "experts: 20 or more"),
    (ONE_LAYER, "x.yaml", "commit_delay: 2"),
    (ONE_REDUCTION, "x.yaml", "state: device"),
    ([*ONE_REDUCTION, "balancer.state=device", "statistics=auto"], "x.yaml", "statistics 'gathered'"),
    ([*ONE_REDUCTION, "balancer.state=device", "balancer.commit_delay=1"], "x.yaml", "1 is too early"),
    (
        [*ONE_REDUCTION, "balancer.state=device", "statistics=auto", "dispatch=allgather", "overlap=before"],
        "x.yaml",
        "overlap: after",
    ),
    ([*ONE_LAYER, "ranks=1", "calls=[start_iter]"], "x.yaml", "commit_delay: 2"),
    (["iterations=1"], "x.yaml", "nothing can move in 1 iterations"),
    (["balancer.warm_up=11"], "x.yaml", "iterations: 13 or more"),
    (["balancer.update_timeout_s=60"], "x.yaml", "smaller than timeout_s"),
    (["statistics=gathered", "dispatch=allgather"], "x.yaml", "only 'alltoall' has"),
    (["statistics=global_ids"], "x.yaml", "only with dispatch 'allgather'"),
    (["statistics=gathered", "dispatch=symm_mem"], "x.yaml", "only 'alltoall' has"),
    (["statistics=global_ids", "dispatch=symm_mem"], "x.yaml", "only with dispatch 'allgather'"),
    (["moe_max_num_tokens=64", "dispatch=symm_mem"], "x.yaml", "chunks run on two streams"),
    (["device=cuda", "share_gpus=true", "dispatch=symm_mem"], "x.yaml", "a GPU for each rank"),
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
        ("3: 4\n" + BASE, "E031", "x.yaml:1:4", "should be strings"),
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
    assert [line.split(": ")[0] for line in lines] == ["x.yaml:1:8", "x.yaml:3:40", "x.yaml:4:12"]


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
    changed = scenario_overrides.apply(document, ["model.layers=9", "record.loads=false"])
    assert document.data == before
    assert changed.data["model"]["layers"] == 9


def test_a_dump_holds_everything_and_loads_back_equal() -> None:
    scenario = load(BASE + "calls: [start_iter, {route: {layer: 1}}]\nname: '1e3'\ndescription: 'on'")
    text = scenarios.dump(scenario)
    assert scenarios.loads(text, "another_name.yaml") == scenario
    assert set(yaml_source.load(text, "x").data) >= {"seed", "timeout_s", "dispatch", "checks", "record"}
