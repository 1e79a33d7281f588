"""One iteration in a context, what an exception leaves behind, and reasons for having no balancer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from moe_eplb.balancer import (
    BalancerOff,
    MoeLoadBalancer,
    MoeLoadBalancerIterContext,
    get_moe_load_balancer,
    maybe_create_moe_load_balancer,
)
from moe_eplb.core import planner as planner_module
from moe_eplb.core.config import LoadBalancerConfig
from moe_eplb.core.errors import BalancerError, ProtocolError
from tests.support.balanced import Rig, StandIn


def iterate(rig: Rig, **info: Any) -> None:
    with MoeLoadBalancerIterContext(rig.balancer, **info):
        for index in range(len(rig.layers)):
            rig.run_layer(index)


def test_starts_and_ends_an_iteration_with_the_info_given() -> None:
    rig = Rig(2)
    rig.balancer.set_iter_info(False, False)
    iterate(rig, enable_statistic=True, enable_updates=True)
    assert (rig.balancer.enable_statistic, rig.balancer.enable_update_weights) == (True, True)
    iterate(rig)
    assert rig.balancer.iter_id == 2
    assert len(rig.journal.loads) == 4
    rig.balancer.shutdown()


def test_does_nothing_without_a_balancer_or_in_static_routing() -> None:
    with MoeLoadBalancerIterContext(None, True, True):
        pass
    balancer = MoeLoadBalancer(0, 1, 0)
    with MoeLoadBalancerIterContext(balancer, True, True):  # not even finalized
        assert balancer.iter_id == 0
    assert balancer.iter_id == 0
    assert not balancer.enable_statistic


def test_an_end_with_a_layer_missing_aborts_and_the_next_iteration_works() -> None:
    rig = Rig(2)
    with pytest.raises(ProtocolError, match="E124"), MoeLoadBalancerIterContext(rig.balancer):
        rig.run_layer(0)
    iterate(rig)
    assert rig.balancer.iter_id == 2
    rig.balancer.shutdown()


# -- exceptions -------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """What a model might raise."""


STEPS = ["before", "waiting", "held", "counted", "local", "routed", "released", "between"]


def raise_in(rig: Rig, *calls: Callable[[], object]) -> None:
    """An iteration that makes these calls and then raises."""
    with MoeLoadBalancerIterContext(rig.balancer):
        for call in calls:
            call()
        raise Fault


def fail_at(rig: Rig, step: str) -> None:
    """An iteration that raises after a step of layer 1's forward."""
    layer, ids = rig.layers[1], rig.ids(1, rig.balancer.iter_id)
    gathered = torch.ones(rig.ranks, rig.experts, dtype=torch.int32)

    def hand_over() -> None:
        layer.update_statistic_with_gathered_statistic(gathered)
        layer.start_set_cpu_stage()

    calls: dict[str, Callable[[], object]] = {
        "before": partial(rig.run_layer, 0),
        "waiting": layer.start_wait_gpu_stage,
        "held": layer.done_wait_gpu_stage,
        "counted": partial(layer.update_local_statistic, ids, True, True),
        "local": layer.get_local_statistic_tensor,
        "routed": partial(layer.route, ids),
        "released": hand_over,
        "between": layer.done_set_cpu_stage,
    }
    with pytest.raises(Fault):
        raise_in(rig, *list(calls.values())[: list(calls).index(step) + 1])


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_an_exception_leaves_the_layer_clean_and_the_next_iteration_works(step: str, seed: int | None) -> None:
    rig = Rig(3, updates=3, empty_group="never", ranks=2, seed=seed)
    rig.iterate(2)
    fail_at(rig, step)
    assert rig.balancer.device.pending() == 0
    assert not any(layer.unfinished for layer in rig.layers)
    rig.assert_weights_match()
    rig.iterate(3)
    rig.balancer.shutdown()
    rig.assert_weights_match()
    assert rig.journal.commits[-1][1:] == (4, 5)


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("step", STEPS)
def test_what_an_abort_leaves_does_not_depend_on_how_far_the_streams_were(step: str, delay: int) -> None:
    """Ranks reorder by seeds of their own: one may have committed, counted or handed over what another discards."""

    def run(seed: int | None) -> tuple[object, ...]:
        rig = Rig(3, updates=3, empty_group="never", ranks=2, seed=seed, commit_delay=delay)
        rig.iterate(2)
        fail_at(rig, step)
        state = rig.placements(), [layer.updates.pending for layer in rig.layers], [s.tolist() for s in rig.storage]
        load = [layer._statistics.load._load.tolist() for layer in rig.layers]
        rig.iterate(3)
        rig.balancer.shutdown()
        return state, load, rig.placements(), rig.journal.commits

    expected = run(None)
    for seed in range(10):
        assert run(seed) == expected


def test_a_plan_that_another_rank_may_have_committed_is_committed_by_the_abort() -> None:
    """The layer's wait was submitted, its work is still queued when the exception comes."""
    queued = 0
    for seed in range(8):
        rig = Rig(2, updates=2, empty_group="never", ranks=2, seed=seed)
        rig.iterate()
        versions: list[int] = []
        look = partial(lambda updates, seen: seen.append(updates.version), rig.layers[0].updates, versions)
        with pytest.raises(Fault):
            raise_in(rig, rig.layers[0].start_wait_gpu_stage, look)
        queued += versions == [0]
        assert rig.layers[0].updates.version == 1
        assert rig.layers[1].updates.version == 0
        rig.assert_weights_match()
        ids = rig.ids(0, 9)
        rig.balancer.start_iter()
        rig.layers[0].start_wait_gpu_stage()
        rig.layers[0].done_wait_gpu_stage()
        slots = rig.layers[0].route(ids)
        assert rig.layers[0].placement.slot_to_expert[slots.numpy()].tolist() == ids.tolist()
        rig.balancer.shutdown()
    assert queued


def test_pending_plans_and_counts_of_an_aborted_iteration_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(2, updates=2, commit_delay=3, empty_group="never")
    rig.iterate()
    with pytest.raises(Fault):
        raise_in(rig)
    assert [(layer, reason) for layer, _, reason in rig.journal.drops] == [
        (0, "iteration 1 was aborted"),
        (1, "iteration 1 was aborted"),
    ]
    assert "plan for iteration 3 dropped in iteration 1: iteration 1 was aborted" in caplog.text
    rig.iterate(4)
    rig.balancer.shutdown()
    assert {(taken, when) for _, taken, when in rig.journal.commits} == {(2, 5)}


def test_an_exception_of_queued_work_is_cleaned_up_too() -> None:
    def broken(tensor: torch.Tensor) -> None:
        raise RuntimeError("connection lost")

    rig = Rig(2, ranks=2, seed=4)
    with pytest.raises(RuntimeError, match="connection lost"), MoeLoadBalancerIterContext(rig.balancer):
        rig.run_layer(0, allreduce=broken)  # type: ignore[arg-type]
    assert rig.balancer.device.pending() == 0
    assert rig.journal.loads == []
    iterate(rig)
    assert len(rig.journal.loads) == 2
    rig.balancer.shutdown()


def test_the_schedule_goes_on_after_an_abort() -> None:
    rig = Rig(2, updates=1, empty_group="never")
    with pytest.raises(Fault):
        raise_in(rig)
    rig.iterate(3)
    rig.balancer.shutdown()
    assert [(layer, taken) for layer, taken, _ in rig.journal.commits] == [(1, 1), (0, 2)]


def test_static_layers_are_clean_after_an_exception_too() -> None:
    rig = Rig(2, updates=0)
    with pytest.raises(Fault):
        raise_in(rig, rig.layers[0].start_wait_gpu_stage)
    with MoeLoadBalancerIterContext(rig.balancer):
        for index in range(2):
            rig.run_layer(index)
    with pytest.raises(ProtocolError, match="E112"):
        rig.layers[0].done_set_cpu_stage()


def test_an_updater_that_fails_during_an_abort_does_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(2, updates=2, empty_group="never")
    monkeypatch.setattr(planner_module, "plan", lambda *_, **__: 1 / 0)
    rig.iterate()
    with pytest.raises(Fault):
        raise_in(rig, partial(rig.run_layer, 0))
    monkeypatch.undo()
    rig.iterate(3, StandIn(1, torch.zeros(rig.experts, dtype=torch.int64)))
    rig.balancer.shutdown()
    assert rig.journal.commits


# -- a balancer or a reason -------------------------------------------------------------------------------------------


@dataclass
class Model:
    architecture: str
    moe_load_balancer: LoadBalancerConfig | None


@dataclass
class Ranks:
    moe_ep_rank: int
    moe_ep_size: int


CONFIG = LoadBalancerConfig(num_slots=8, ep_size=2, layer_updates_per_iter=1)
STATIC = LoadBalancerConfig(num_slots=8, ep_size=2, layer_updates_per_iter=0)


def never(config: LoadBalancerConfig) -> MoeLoadBalancer:
    raise AssertionError("no balancer is to be made")


@pytest.mark.parametrize(
    ("architecture", "config", "size", "reason"),
    [
        ("MixtralForCausalLM", None, 4, "no load balancer is configured"),
        ("MixtralForCausalLM", CONFIG, 1, "one rank has nothing to balance"),
        ("LlamaForCausalLM", CONFIG, 4, "architecture LlamaForCausalLM is not supported"),
    ],
)
def test_why_there_is_no_balancer(
    architecture: str, config: LoadBalancerConfig | None, size: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        off = maybe_create_moe_load_balancer(Model(architecture, config), Ranks(0, size), never)
    assert isinstance(off, BalancerOff)
    assert reason in off.reason
    assert f"balancer: off, because {off.reason}" in caplog.text
    with off:
        assert get_moe_load_balancer() is None


def test_a_static_configuration_makes_a_balancer_and_says_that_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    made = MoeLoadBalancer(0, 2, 0)
    model = Model("Qwen3MoeForCausalLM", STATIC)
    assert maybe_create_moe_load_balancer(model, Ranks(0, 2), lambda _: made) is made
    assert "balancer: off, because layer_updates_per_iter is 0" in caplog.text


@pytest.mark.parametrize(
    "architecture", ["DeepseekV3ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_a_configured_model_of_several_ranks_gets_its_balancer(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[LoadBalancerConfig] = []
    made = MoeLoadBalancer(0, 1, 1)

    def make(config: LoadBalancerConfig) -> MoeLoadBalancer:
        given.append(config)
        return made

    assert maybe_create_moe_load_balancer(Model(architecture, CONFIG), Ranks(0, 2), make) is made
    assert given == [CONFIG]
    assert caplog.text == ""


def test_an_exception_passes_through_the_place_holder() -> None:
    with pytest.raises(ZeroDivisionError), BalancerOff("because"):
        _ = 1 / 0


@pytest.mark.parametrize(("slots", "ep_size", "code"), [(8, 8, "E156"), (9, None, "E157"), (8, None, ""), (8, 4, "")])
def test_a_configuration_made_for_other_ranks_is_refused(slots: int, ep_size: int | None, code: str) -> None:
    config = LoadBalancerConfig(num_slots=slots, layer_updates_per_iter=1, ep_size=ep_size)
    model, mapping = Model("MixtralForCausalLM", config), Ranks(0, 4)
    made: list[LoadBalancerConfig] = []

    def make(given: LoadBalancerConfig) -> MoeLoadBalancer:
        made.append(given)
        return MoeLoadBalancer(0, 1, 1)

    if not code:
        assert isinstance(maybe_create_moe_load_balancer(model, mapping, make), MoeLoadBalancer)
    else:
        with pytest.raises(BalancerError, match=code):
            maybe_create_moe_load_balancer(model, mapping, make)
    assert len(made) == (not code)
