from __future__ import annotations

import pytest

from moe_eplb.core import scenario as scenarios
from moe_eplb.core import scenario_parts
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario
from tests.support.workloads import make

KINDS = scenario_parts.Workload.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]


def refused(work: str, **more: int | str) -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        make(work, **more)  # type: ignore[arg-type]
    assert caught.value.code == "E032"
    return caught.value


# A key, a value that is not its default, and the kinds that read it.
OF_KIND = [
    ("skew", 2.0, {"zipf"}),
    ("hot_experts", 2, {"hot", "spread_hot", "rotating", "burst"}),
    ("hot_share", 0.9, {"hot", "hot_rank", "spread_hot", "rotating", "burst"}),
    ("hot_rank", 1, {"hot_rank"}),
    ("idle_experts", 1, {"idle"}),
    ("idle_rank", 1, {"idle"}),
    ("burst_every", 4, {"burst"}),
    ("burst_factor", 2, {"burst"}),
    ("drift_every", 2, {"zipf", "hot", "rotating"}),
    ("path", "x.npz", {"recorded"}),
    ("order", "position", {"recorded"}),
]
NEEDED = {"idle": "idle_experts: 1", "recorded": "path: x.npz"}


@pytest.mark.parametrize(("key", "value", "kinds"), OF_KIND)
def test_keys_of_other_kinds_are_refused(key: str, value: object, kinds: set[str]) -> None:
    for kind in KINDS:
        needed = NEEDED.get(kind, "seed")
        parts = [
            f"kind: {kind}",
            f"{key}: {value}",
            *([needed] if kind in NEEDED and not needed.startswith(key) else []),
        ]
        work = "{" + ", ".join(parts) + "}"
        if kind in kinds:
            assert getattr(make(work).workload, key) is not None
        else:
            error = refused(work)
            assert f"{key!r} has no effect with kind {kind!r}" in str(error)
            assert error.hint.startswith("remove it, or use kind ")
            assert set(error.hint.removeprefix("remove it, or use kind ").split(" or ")) == kinds


@pytest.mark.parametrize(
    ("work", "message", "hint"),
    [
        ("{prompt_tokens: 2}", "'prompt_tokens' has no effect with steps 'decode'", "prefill or mixed or generate"),
        (
            "{steps: generate, ragged: 0.5}",
            "'ragged' has no effect with steps 'generate'",
            "decode or prefill or mixed",
        ),
        ("{kind: recorded, path: x.npz, ragged: 0.5}", "'ragged' does not go with kind 'recorded'", "remove it"),
        ("{tokens_per_rank: 9, ragged: 0.1}", "0.1 of at most 9 tokens is less than one", "ragged: 0.112 or more"),
        ("{kind: recorded}", "needs the path of its file", "add 'path: loads.npz'"),
        ("{kind: hot, hot_experts: 17}", "17 hot experts of only 16", ""),
        ("{kind: rotating, hot_experts: 17}", "17 hot experts of only 16", ""),
        ("{kind: spread_hot, hot_experts: 17}", "17 hot experts of only 16", ""),
        ("{kind: burst, hot_experts: 17}", "17 hot experts of only 16", ""),
        ("{kind: hot_rank, hot_rank: 2}", "there is no rank 2: ranks are 0 to 1", ""),
        ("{kind: idle, idle_rank: 2}", "there is no rank 2: ranks are 0 to 1", ""),
        ("{kind: burst, burst_every: 13}", "burst_every 13 is more than the 12 iterations", "burst_every: 12"),
        ("{tokens_per_rank: [1, 2, 3]}", "3 numbers of tokens for 2 ranks", ""),
        ("{tokens_per_rank: [0, 0]}", "no rank has any token", "give at least one rank a token"),
        ("{tokens_per_rank: 0, steps: prefill, prompt_tokens: 9}", "no rank has any token", "at least one rank"),
        ("{kind: idle}", "no expert is idle", "add 'idle_experts: 1' or 'idle_rank: 0'"),
        (
            "{kind: idle, idle_experts: 13}",
            "3 of 16 experts of layer 0 are left to be asked for, top_k is 4",
            "idle_experts: 12 or less",
        ),
        (
            "{kind: idle, idle_rank: 0, idle_experts: 5}",
            "3 of 16 experts of layer 0 are left to be asked for, top_k is 4",
            "idle_experts: 4 or less",
        ),
    ],
)
def test_workloads_that_cannot_be(work: str, message: str, hint: str) -> None:
    error = refused(work)
    assert message in str(error)
    assert hint in error.hint
    assert error.where.startswith("test.yaml:1:")


@pytest.mark.parametrize(
    ("work", "most", "keys"),
    [
        ("tokens_per_rank: 1048576, ragged: 0.5", 1572864, "tokens_per_rank or ragged"),
        (
            "tokens_per_rank: [1024, 1], steps: prefill, prompt_tokens: 1025",
            1049600,
            "tokens_per_rank or prompt_tokens",
        ),
        ("tokens_per_rank: 1024, steps: generate, prompt_tokens: 1025", 1049600, "tokens_per_rank or prompt_tokens"),
        ("tokens_per_rank: 1, steps: mixed, prompt_tokens: 1048576", 1048577, "tokens_per_rank or prompt_tokens"),
        ("kind: burst, tokens_per_rank: 65537, burst_factor: 16", 1048592, "tokens_per_rank or burst_factor"),
    ],
)
def test_more_tokens_than_the_bound_are_refused_with_the_keys_that_make_them(work: str, most: int, keys: str) -> None:
    error = refused("{" + work + "}")
    assert error.what == f"up to {most} tokens of a rank in an iteration, 1048576 are the most"
    assert error.hint == f"lower {keys}"


def test_as_many_tokens_as_the_bound_are_accepted() -> None:
    make("{tokens_per_rank: 1048576}")
    make("{tokens_per_rank: 1024, steps: prefill, prompt_tokens: 1024}")
    make("{tokens_per_rank: 524288, ragged: 1.0}")
    make("{tokens_per_rank: 1048575, steps: mixed}")


HALF = "{slots_per_rank: 8}"
ALL = "{slots_per_rank: 16}"


@pytest.mark.parametrize(
    ("work", "balancer", "message", "hint"),
    [
        ("{kind: hot_rank}", ALL, "rank 0 holds all 16 experts of layer 0 at the start", "kind 'uniform'"),
        ("{kind: idle, idle_rank: 1}", ALL, "rank 1 alone holds no expert of layer 0 at the start", "fewer slots"),
        ("{kind: idle, idle_rank: 1, idle_experts: 2}", ALL, "rank 1 alone holds no expert", "another rank"),
        ("{kind: spread_hot}", ALL, "all experts of layer 0 begin on one rank", "use kind 'hot'"),
        ("{kind: hot_rank}", HALF, "", ""),
        ("{kind: idle, idle_rank: 1}", HALF, "", ""),
        ("{kind: spread_hot, hot_experts: 16}", HALF, "", ""),
        # 12 slots a rank: the second rank's first eight hold experts 8 to 15, so the first slots are 12 and 4.
        ("{kind: spread_hot, hot_experts: 9}", "{slots_per_rank: 12}", "", ""),
        (
            "{kind: spread_hot, hot_experts: 10}",
            "{slots_per_rank: 12}",
            "the ranks hold 12, 4 experts of layer 0 at the start: 10 hot ones cannot be spread evenly",
            "hot_experts: 9 or less",
        ),
    ],
)
def test_what_a_workload_is_aimed_at_must_be_there(work: str, balancer: str, message: str, hint: str) -> None:
    if not message:
        assert make(work, balancer=balancer).balancer is not None
        return
    error = refused(work, balancer=balancer)
    assert message in str(error)
    assert hint in error.hint


def test_a_layer_s_own_assignment_is_what_counts() -> None:
    def assigned(layer_1: str) -> str:
        return f"{{slots_per_rank: 4, initial_global_assignments: {{0: [0, 1, 2, 2, 3, 3, 1, 0], 1: {layer_1}}}}}"

    work = "{kind: idle, idle_rank: 1}"
    assert make(work, experts=4, top_k=1, balancer=assigned("[0, 0, 0, 0, 1, 2, 3, 0]")).ranks == 2
    error = refused(work, experts=4, top_k=1, balancer=assigned("[0, 1, 2, 3, 1, 2, 3, 0]"))
    assert "rank 1 alone holds no expert of layer 1" in str(error)
    error = refused(work, experts=4, top_k=2, balancer=assigned("[0, 0, 0, 0, 1, 2, 3, 0]"))
    assert "1 of 4 experts of layer 1 are left to be asked for, top_k is 2" in str(error)


def test_a_start_that_is_itself_wrong_is_reported_alone() -> None:
    broken = "{slots_per_rank: 3, initial_global_assignments: {0: [0, 1], 1: [9, 2, 1, 0, 1, 99999999999999999999]}}"
    for work in ("{kind: hot_rank}", "{kind: idle, idle_rank: 1}", "{kind: spread_hot}"):
        error = refused(work, experts=4, top_k=1, balancer=broken)
        assert "at the start" not in str(error)
        assert "layer 0 assigns 2 slots, there are 6" in str(error)
    assert "4 slots cannot hold 16 experts" in str(refused("{kind: hot_rank}", balancer="{slots_per_rank: 2}"))


def with_calls(work: str) -> Scenario:
    text = f"{{ranks: 2, model: {{layers: 2, experts: 16, top_k: 4}}, workload: {work}, calls: [start_iter],"
    return scenarios.loads(text + " balancer: {num_slots: 20}}", "test.yaml")


def test_calls_need_no_tokens() -> None:
    assert with_calls("{tokens_per_rank: [0, 0]}").calls is not None
    with pytest.raises(ScenarioError, match="3 numbers of tokens for 2 ranks"):
        with_calls("{tokens_per_rank: [0, 0, 0]}")
