"""Configuration that is never ignored in silence: a file's unknown keys, and every reason for having no balancer."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ConfigDict

from moe_eplb.balancer import MoeLoadBalancer, iter_context
from moe_eplb.core import config, scenario_load
from moe_eplb.core.config import LoadBalancerConfig
from moe_eplb.core.scenario import Scenario
from tests.support.faults.base import Fault, demand, log_lines, refused

__all__ = ["FAULTS"]


UNKNOWN = {"layer_update_per_iter: 1": "'layer_updates_per_iter'", "decay: 0.9": "the keys are num_slots"}
"""Lines of a file, and what the hint says of them."""


def check_unknown_keys() -> None:
    """A key that TensorRT-LLM's file does not have is named, with its place and the key that was meant."""
    for line, hint in UNKNOWN.items():
        text = f"num_slots: 8\n{line}\n"
        error = refused(partial(config.loads, text, "eplb.yaml"), "E031", f"the key {line}")
        demand(line.split(":")[0] in error.what and hint in error.hint, f"the key {line} is not named: {error}")
        demand(error.where == "eplb.yaml:2:1", f"the key {line} has no place: {error.where}")


def unknown_keys_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """What is not known is left out."""

    class Lenient(LoadBalancerConfig):
        model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    patch.setattr(config, "LoadBalancerConfig", Lenient)


DYNAMIC = LoadBalancerConfig(num_slots=8, layer_updates_per_iter=1, ep_size=4)
STATIC = LoadBalancerConfig(num_slots=8, layer_updates_per_iter=0, ep_size=4)


OFF_BECAUSE = [
    ("LlamaForCausalLM", 4, DYNAMIC, "architecture LlamaForCausalLM is not supported"),
    ("MixtralForCausalLM", 1, DYNAMIC, "one rank has nothing to balance"),
    ("MixtralForCausalLM", 4, STATIC, "layer_updates_per_iter is 0 (static routing)"),
    ("MixtralForCausalLM", 4, None, "no load balancer is configured"),
]
"""Architecture, ranks, configuration, and why nothing will move."""


def check_reasons() -> None:
    """Where nothing will move, the log says so and says why; so does what stands in the balancer's place."""
    silent = []
    for architecture, ranks, given, reason in OFF_BECAUSE:
        model: Any = SimpleNamespace(architecture=architecture, moe_load_balancer=given)
        mapping: Any = SimpleNamespace(moe_ep_rank=0, moe_ep_size=ranks)
        with log_lines() as lines:
            made: Any = iter_context.maybe_create_moe_load_balancer(model, mapping, lambda _: MoeLoadBalancer(0, 2, 0))
        said = [line for line in lines if line.startswith("balancer: off, because") and reason in line]
        if len(said) != 1 or (given is not STATIC and reason not in made.reason):
            silent.append(reason)
    demand(not silent, f"nobody says: {'; '.join(silent)}")


def nothing_is_logged(patch: pytest.MonkeyPatch) -> None:
    """An empty context stands in the balancer's place, and that is all."""
    patch.setattr(iter_context, "BalancerOff", lambda _: contextlib.nullcontext())
    patch.setattr(iter_context, "_LOG", SimpleNamespace(warning=lambda *_: None))


def static_is_not_mentioned(patch: pytest.MonkeyPatch) -> None:
    """A balancer that never moves anything looks like any other."""
    log = iter_context._LOG

    def warning(text: str, *args: object) -> None:
        if args:
            log.warning(text, *args)

    patch.setattr(iter_context, "_LOG", SimpleNamespace(warning=warning))


SCENARIO = """\
name: settings
ranks: 2
iterations: 2
model: {layers: 2, experts: 4, top_k: 2}
workload: {kind: uniform, tokens_per_rank: 4}
balancer: {num_slots: 8, layer_updates_per_iter: 1}
"""
OFF = {
    "balancer.layer_updates_per_iter=0": "static routing",
    "ranks=1": "one rank",
    "balancer=null": "no balancer section",
}


def check_scenarios() -> None:
    """A scenario in which nothing will move has a reason, which verdict and log repeat; unknown keys are refused."""
    demand(scenario_load.loads(SCENARIO, "s.yaml").balancer_off_reason() is None, "the balancer is on")
    for override, reason in OFF.items():
        found = scenario_load.loads(SCENARIO, "s.yaml", [override]).balancer_off_reason()
        demand(found is not None and reason in found, f"a scenario with {override} gives no reason")
    misspelt = SCENARIO.replace("layer_updates_per_iter", "layer_update_per_iter")
    error = refused(lambda: scenario_load.loads(misspelt, "s.yaml"), "E030", "a misspelt key of a scenario")
    demand("layer_updates_per_iter" in str(error), f"the key that was meant is not named: {error}")


def no_reasons(patch: pytest.MonkeyPatch) -> None:
    """A scenario does not know that its balancer is off."""
    patch.setattr(Scenario, "balancer_off_reason", lambda self: None)


FAULTS = [
    Fault(
        "unknown keys of a balancer file are ignored", check_unknown_keys, unknown_keys_are_dropped,
        "the key layer_update_per_iter: 1: was not refused",
    ),
    Fault(
        "an unsupported model or one rank is ignored in silence", check_reasons, nothing_is_logged,
        "nobody says: " + "; ".join(re.escape(reason) for *_, reason in OFF_BECAUSE),
    ),
    Fault(
        "static routing is taken for balancing", check_reasons, static_is_not_mentioned,
        r"nobody says: layer_updates_per_iter is 0 \(static routing\)$",
    ),
    Fault(
        "a scenario's balancer is off without a reason", check_scenarios, no_reasons,
        "a scenario with balancer.layer_updates_per_iter=0 gives no reason",
    ),
]  # fmt: skip
