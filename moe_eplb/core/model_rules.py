"""What must hold within the model section of a scenario, and between it and the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_eplb.core.dtypes import FP8, ITEM_BYTES
from moe_eplb.core.problem import Problem
from moe_eplb.core.yaml_source import Loc

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["problems"]

_ROW_BYTES = 16
_OF_DEEPSEEK_V3 = ("groups", "top_groups", "scale", "normalize")


def problems(s: Scenario) -> Iterator[Problem]:
    """Everything wrong with the model of a scenario."""
    for rule in (_experts, _alignment, _fp8, _routing, _repeats, _checkpoint):
        yield from rule(s)
    if s.model.part == "whole":
        yield from _whole_model(s)


def _experts(s: Scenario) -> Iterator[Problem]:
    if s.model.top_k > s.model.experts:
        yield Problem(("model", "top_k"), f"top_k {s.model.top_k} is more than the {s.model.experts} experts")
    if s.balancer is not None and s.model.backend != "wide_ep":
        what = f"backend {s.model.backend!r} keeps every expert on every rank and cannot have a balancer"
        yield Problem(("model", "backend"), what, "use backend 'wide_ep' or remove the balancer section")


def _alignment(s: Scenario) -> Iterator[Problem]:
    item = ITEM_BYTES[s.model.dtype]
    step = _ROW_BYTES // item
    for name in ("hidden", "intermediate"):
        size = getattr(s.model, name)
        if s.calls is None and size % step:
            what = f"{name} {size} does not fit grouped GEMM: {size * item} bytes of {s.model.dtype} are no multiple"
            hint = f"{name}: {max(step, round(size / step) * step)} is the nearest that fits"
            yield Problem(("model", name), f"{what} of {_ROW_BYTES}", "" if s.model.hf else hint, "E152")


def _fp8(s: Scenario) -> Iterator[Problem]:
    if s.model.dtype != FP8:
        return
    if s.model.backend == "fused":
        what = "the batched product of backend 'fused' takes no scales, which fp8 experts have"
        yield Problem(("model", "backend"), what, "use backend 'wide_ep' or 'grouped', or dtype 'bfloat16'", "E158")
    if s.model.part == "whole":
        what = "a whole model is loaded in one dtype, and none computes in fp8"
        yield Problem(("model", "dtype"), what, "use part 'blocks', or dtype 'bfloat16'")


def _routing(s: Scenario) -> Iterator[Problem]:
    routing = s.model.routing
    loc: Loc = ("model", "routing")
    # What a checkpoint says about its router is part of the scenario whoever chooses the experts.
    if s.workload.kind != "model" and s.model.hf is None and routing != type(routing)():
        what = f"the router has no say with workload kind {s.workload.kind!r}"
        yield Problem(loc, what, "use workload kind 'model' or remove the routing section")
    if routing.method == "llama4" and s.model.top_k != 1:
        what = f"routing 'llama4' chooses one expert, top_k is {s.model.top_k}"
        yield Problem(("model", "top_k"), what, "top_k: 1")
    if routing.method == "deepseek_v3":
        yield from _groups(s)
        return
    for name in _OF_DEEPSEEK_V3:
        if getattr(routing, name) != type(routing).model_fields[name].default:
            what = f"{name!r} has no effect with routing {routing.method!r}"
            yield Problem((*loc, name), what, f"remove {name!r}")


def _groups(s: Scenario) -> Iterator[Problem]:
    routing, experts = s.model.routing, s.model.experts
    loc: Loc = ("model", "routing")
    if experts % routing.groups:
        yield Problem((*loc, "groups"), f"{routing.groups} groups do not divide {experts} experts")
    elif routing.top_groups > routing.groups:
        yield Problem((*loc, "top_groups"), f"top_groups {routing.top_groups} of only {routing.groups} groups")
    elif s.model.top_k > routing.top_groups * (experts // routing.groups):
        room = routing.top_groups * (experts // routing.groups)
        yield Problem((*loc, "top_groups"), f"top_k {s.model.top_k} experts out of groups that hold only {room}")
    elif routing.groups > 1 and experts // routing.groups < 2:
        yield Problem((*loc, "groups"), "a group is scored by its two best experts", "use fewer groups")


def _repeats(s: Scenario) -> Iterator[Problem]:
    loc: Loc = ("model", "repeated_layers")
    for layer in s.model.repeated_layers:
        if not 0 <= layer < s.model.layers:
            yield Problem((*loc, layer), f"there is no layer {layer}: layers are 0 to {s.model.layers - 1}")
    if s.model.repeated_layers and s.model.part == "whole":
        what = "'repeated_layers' has no effect with a whole model, which runs its layers as it is made"
        yield Problem(loc, what, "remove it, or use part 'blocks'")


def _checkpoint(s: Scenario) -> Iterator[Problem]:
    if s.model.part is not None and s.model.hf is None:
        what = f"part {s.model.part!r} of a checkpoint, and none is given"
        yield Problem(("model", "part"), what, "add 'hf: folder', or remove 'part'")
    if s.model.part is None and s.model.hf is not None:
        yield Problem(("model", "hf"), "which part of the checkpoint?", "add 'part: whole' or 'part: blocks'")


def _whole_model(s: Scenario) -> Iterator[Problem]:
    if s.workload.kind != "model":
        what = f"a whole model chooses its experts itself, the workload's kind is {s.workload.kind!r}"
        yield Problem(("workload", "kind"), what, "use kind 'model', or part 'blocks'")
    if s.workload.steps != "generate":
        what = f"a whole model generates, the workload's steps are {s.workload.steps!r}"
        yield Problem(("workload", "steps"), what, "use steps 'generate', or part 'blocks'")
    if s.model.backend != "wide_ep":
        what = f"backend {s.model.backend!r} cannot stand in a whole model"
        yield Problem(("model", "backend"), what, "use backend 'wide_ep'")
    tokens = s.workload.tokens_per_rank
    if 0 in (tokens if isinstance(tokens, tuple) else (tokens,)):
        what = "a rank without sequences has nothing to generate"
        yield Problem(("workload", "tokens_per_rank"), what, "give every rank of a whole model a sequence")
