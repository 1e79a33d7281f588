"""The tables of call names: what the shipped ones recognise, and which tables are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_eplb.analysis.call_names import CallNames, Source, load_call_names
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import KINDS, Kind


def _found(names: CallNames, text: str, domain: str = "") -> tuple[Kind, int, int] | None:
    return next((match for rule in names.calls if (match := rule.match(domain, text)) is not None), None)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_ranges_are_known_by_domain_and_name(kind: Kind) -> None:
    names = load_call_names()
    for domain in ("moe_eplb", "user_annotation"):
        assert _found(names, f"{KINDS[kind].name}/7", domain) == (kind, 7, -1)
        assert _found(names, KINDS[kind].name, domain) == (kind, -1, -1)
    assert _found(names, f"{KINDS[kind].name}/7", "other") is None
    assert _found(names, f"my {KINDS[kind].name}/7", "moe_eplb") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("start_wait_gpu_stage", (Kind.START_WAIT_GPU_STAGE, -1, -1)),
        ("SingleLayerMoeLoadBalancer.done_wait_gpu_stage layer 3", (Kind.DONE_WAIT_GPU_STAGE, 3, -1)),
        ("_load_balancer_start_set_cpu_stage", (Kind.START_SET_CPU_STAGE, -1, -1)),
        ("update_statistic_with_local_ids:12", (Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, 12, -1)),
        ("SingleLayerMoeLoadBalancer.route layer=5", (Kind.ROUTE, 5, -1)),
        ("_load_balancer_route", (Kind.ROUTE, -1, -1)),
        ("MoeLoadBalancer.start_iter 41", (Kind.START_ITER, -1, 41)),
        ("end_iter", (Kind.END_ITER, -1, -1)),
        ("MoeLoadBalancerIterContext 9", (Kind.START_ITER, -1, 9)),
        ("routed experts", None),
        ("self.routing_method.route_tokens", None),
        ("restart_iter", None),
        ("start_iteration", None),
        ("moe_load_balancer", None),
    ],
)
def test_tensorrt_llm_calls_are_known_by_the_names_of_its_methods(
    text: str, expected: tuple[Kind, int, int] | None
) -> None:
    assert _found(load_call_names(["tensorrt_llm"]), text) == expected


def test_tensorrt_llm_kernels_are_known() -> None:
    names = load_call_names(["tensorrt_llm"])
    prefix = "void tensorrt_llm::kernels::"
    assert names.by_kernel(f"{prefix}moeWaitSignalForGpuStageKernel(Signal*, int*)") is Kind.START_WAIT_GPU_STAGE
    assert names.by_kernel(f"{prefix}moeComputeRouteNoRedundantKernel<1024, 256, 4>(int*)") is Kind.ROUTE
    assert names.by_kernel(f"{prefix}statisticKernel<int>(int*)") is Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS
    assert names.by_kernel(f"{prefix}moeSetSignalForCpuStageKernel(Signal*)") is Kind.START_SET_CPU_STAGE
    assert names.by_kernel("gemm") is None
    assert load_call_names().by_kernel(f"{prefix}moeComputeRouteKernel()") is None


def test_tables_are_asked_in_the_order_given_and_before_ours(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("calls: [{text: '^go (?P<layer>\\d+)$', call: route}]")
    second.write_text("calls: [{text: '^go', call: start_set_cpu_stage}, {text: '^route', call: end_iter}]")
    names = load_call_names([first, second])
    assert _found(names, "go 3") == (Kind.ROUTE, 3, -1)
    assert _found(names, "go") == (Kind.START_SET_CPU_STAGE, -1, -1)
    assert _found(names, "route/1", "moe_eplb") == (Kind.END_ITER, -1, -1)
    assert _found(load_call_names([second, first]), "go 3") == (Kind.START_SET_CPU_STAGE, -1, -1)


def test_where_numbers_stand_is_the_group_if_there_is_one(tmp_path: Path) -> None:
    table = tmp_path / "names.yaml"
    table.write_text("calls: [{text: 'a (?P<layer>\\d+)', call: route, iteration: payload}, {text: b, call: route}]")
    given, other = load_call_names([table]).calls[:2]
    assert (given.layer, given.iteration) == (Source.GROUP, Source.PAYLOAD)
    assert (other.layer, other.iteration) == (Source.ENCLOSING, Source.ENCLOSING)


REFUSED = {
    "no mapping": "- 1",
    "an unknown key": "call: []",
    "no list": "calls: {}",
    "a rule that is no mapping": "calls: [3]",
    "an unknown key of a rule": "calls: [{text: a, call: route, stage: 1}]",
    "no pattern": "calls: [{call: route}]",
    "no call": "calls: [{text: a}]",
    "an unknown call": "calls: [{text: a, call: rout}]",
    "a call that is no text": "calls: [{text: a, call: 7}]",
    "a pattern that is none": "calls: [{text: '(', call: route}]",
    "a pattern that is too long": f"calls: [{{text: {'a' * 1001}, call: route}}]",
    "a kind without its group": "calls: [{text: a, call: kind}]",
    "a layer without its group": "calls: [{text: a, call: route, layer: group}]",
    "an unknown source": "calls: [{text: a, call: route, layer: text}]",
    "one payload for two numbers": "calls: [{text: a, call: route, layer: payload, iteration: payload}]",
    "a kernel of no kind": "kernels: [{name: a, kind: gemm}]",
    "a layer's pattern without a group": "layers: [layer]",
    "an iteration's pattern without a group": "iterations: [step]",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_table_that_means_nothing_is_refused_with_its_place(what: str, tmp_path: Path) -> None:
    table = tmp_path / "names.yaml"
    table.write_text(REFUSED[what])
    with pytest.raises(TraceError) as caught:
        load_call_names([table])
    assert caught.value.code == "E070"
    assert caught.value.where.startswith(f"{table}:1:")
    assert caught.value.why


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"calls: [", b"calls: []\ncalls: []"])
def test_a_file_that_is_no_table_is_refused(content: bytes | None, tmp_path: Path) -> None:
    table = tmp_path / "names.yaml"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(TraceError, match="E070") as caught:
        load_call_names([table])
    assert "tensorrt_llm" in caught.value.hint


def test_a_number_that_is_too_long_is_none() -> None:
    names = load_call_names()
    assert _found(names, "route/" + "9" * 9, "moe_eplb") is None
    assert _found(names, "route/" + "9" * 8, "moe_eplb") == (Kind.ROUTE, 99_999_999, -1)
