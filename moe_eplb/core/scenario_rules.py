"""What must hold between the sections of a scenario. Each rule names the place, the numbers and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_eplb.core import model_rules, thresholds, workload_rules
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.problem import Problem
from moe_eplb.core.yaml_source import Loc

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario
    from moe_eplb.core.scenario_parts import Balancer

__all__ = ["problems"]


def problems(s: Scenario) -> tuple[Problem, ...]:
    """Everything that does not fit together in a scenario whose values are each acceptable."""
    rules = [
        model_rules.problems,
        _dispatch,
        _symm_mem,
        _overlap,
        _execution,
        _chunks,
        workload_rules.problems,
        _calls,
        _recorder,
        _thresholds,
    ]
    found = [problem for rule in rules for problem in rule(s)]
    if s.balancer is not None:
        of_balancer = (_slots, _experts, _updates, _weights_from, _reduction, _policy, _assignments)
        found += [problem for rule in of_balancer for problem in rule(s, s.balancer)]
    return tuple(found)


def _dispatch(s: Scenario) -> Iterator[Problem]:
    if s.statistics == "gathered" and s.dispatch != "alltoall":
        hint = "use dispatch 'alltoall', or statistics 'local_ids'"
        yield Problem(("statistics",), "gathered statistics ride in the exchange that only 'alltoall' has", hint)
    if s.statistics == "global_ids" and s.dispatch != "allgather":
        hint = "use dispatch 'allgather', or statistics 'auto'"
        yield Problem(("statistics",), "the ids of all ranks reach every rank only with dispatch 'allgather'", hint)


def _symm_mem(s: Scenario) -> Iterator[Problem]:
    if s.dispatch != "symm_mem":
        return
    hint = "dispatch: alltoall or allgather"
    if s.moe_max_num_tokens is not None:
        what = "chunks run on two streams, and exchanges of dispatch 'symm_mem' on one alone"
        yield Problem(("moe_max_num_tokens",), what, f"remove it, or {hint}")
    if s.share_gpus:
        yield Problem(("share_gpus",), "dispatch 'symm_mem' takes a GPU for each rank", f"remove it, or {hint}")


def _overlap(s: Scenario) -> Iterator[Problem]:
    if s.overlap != "before" or s.calls is not None:
        return
    counted = "overlap 'before' counts the ids of all ranks"
    if s.dispatch != "allgather":
        yield Problem(("overlap",), f"{counted}, which only dispatch 'allgather' brings", "dispatch: allgather")
    if s.statistics not in ("auto", "global_ids"):
        yield Problem(("statistics",), f"{counted}, not {s.statistics!r}", "statistics: auto")


def _execution(s: Scenario) -> Iterator[Problem]:
    if s.share_gpus and s.device != "cuda":
        yield Problem(("share_gpus",), "ranks share GPUs only with device 'cuda'", "remove it, or use device: cuda")
    if s.execution == "eager":
        return
    for holds, what, hint in (
        (s.device == "cuda", "only device 'cuda' has graphs", "device: cuda"),
        (s.calls is None, "'calls' run no forward that could be captured", "remove it"),
        (s.model.part != "whole", "a whole model's cache grows, so that no two forwards are alike", "part: blocks"),
        (s.model.backend == "wide_ep", f"backend {s.model.backend!r} waits for the device", "backend: wide_ep"),
        (s.model.dtype != "float32", "the grouped product of float32 waits for the device", "dtype: bfloat16"),
        (not s.share_gpus, "collectives through host memory cannot be captured", "share_gpus: false"),
        (s.balancer_off_reason() is not None or _on_device(s), "a replay asks no host", "balancer.state: device"),
    ):
        if not holds:
            yield Problem(("execution",), what, hint)


def _on_device(s: Scenario) -> bool:
    return s.balancer is not None and s.balancer.state == "device"


def _chunks(s: Scenario) -> Iterator[Problem]:
    most, loc = s.moe_max_num_tokens, ("moe_max_num_tokens",)
    if most is not None and s.calls is not None:
        yield Problem(loc, "'moe_max_num_tokens' has no effect with 'calls', which run no layer", "remove it")
    elif most is not None and most < s.ranks:
        what = f"a layer that takes {most} tokens at a time cannot take one of each of the {s.ranks} ranks"
        yield Problem(loc, what, f"moe_max_num_tokens: {s.ranks} or more")


def _calls(s: Scenario) -> Iterator[Problem]:
    if s.calls is None:
        if s.expect_error is not None:
            yield Problem(("expect_error",), "an error is expected of 'calls', and there are none", "add 'calls'")
        return
    if s.balancer is None:
        yield Problem(("calls",), "calls need a balancer to call", "add a balancer section")
    for index, step in enumerate(s.calls):
        if step.layer >= s.model.layers:
            yield Problem(("calls", index, "layer"), f"layer {step.layer} of only {s.model.layers} layers")
    if s.expect_error is not None and s.expect_error.at is not None and s.expect_error.at >= len(s.calls):
        what = f"call {s.expect_error.at} is expected to fail and there are {len(s.calls)} calls, counted from 0"
        yield Problem(("expect_error", "at"), what)


def _recorder(s: Scenario) -> Iterator[Problem]:
    if s.record.recorder != "torch":
        return
    if s.calls is not None:
        yield Problem(("record", "recorder"), "the torch profiler has no iteration to record with 'calls'", "remove it")
    elif s.iterations <= s.record.profile_iterations:
        what = f"{s.iterations} iterations leave none for the profiler to warm up before it records"
        hint = f"iterations: {s.record.profile_iterations + 1} or more, or fewer record.profile_iterations"
        yield Problem(("record", "profile_iterations"), what, hint)


def _thresholds(s: Scenario) -> Iterator[Problem]:
    for metric, text in s.checks.thresholds.items():
        try:
            thresholds.parse(metric, text)
        except ScenarioError as error:
            what = f"{error.what}: {error.why}" if error.why else error.what
            yield Problem(("checks", "thresholds", metric), what, error.hint, error.code)


def _slots(s: Scenario, b: Balancer) -> Iterator[Problem]:
    given = [name for name in ("num_slots", "slots_per_rank") if getattr(b, name) is not None]
    if len(given) != 1 and b.config is None:
        what = "give either num_slots or slots_per_rank" + (", not both" if given else "")
        yield Problem(
            ("balancer", *given[-1:]), what, f"slots_per_rank: {-(-s.model.experts // s.ranks)} is the fewest"
        )
    if len(given) != 1:
        return
    loc: Loc = ("balancer", given[0])
    slots = b.num_slots if b.num_slots is not None else s.ranks * (b.slots_per_rank or 0)
    fewest = -(-s.model.experts // s.ranks) * s.ranks
    legal = max(fewest, round(slots / s.ranks) * s.ranks)
    hint = (
        f"num_slots: {legal} is the nearest that fits"
        if given[0] == "num_slots"
        else f"slots_per_rank: {legal // s.ranks}"
    )
    if slots < s.model.experts:
        yield Problem(loc, f"{slots} slots cannot hold {s.model.experts} experts", hint)
    elif slots % s.ranks:
        yield Problem(loc, f"{slots} slots cannot be shared out evenly over {s.ranks} ranks", hint)


def _experts(s: Scenario, b: Balancer) -> Iterator[Problem]:
    """Each rank keeps the host copies of its share of the experts, where any can move."""
    if s.model.experts < s.ranks and s.balancer_off_reason() is None:
        what = f"{s.model.experts} experts are too few for a balancer of {s.ranks} ranks: each shares one or more"
        hint = f"experts: {s.ranks} or more, or balancer.layer_updates_per_iter: 0"
        yield Problem(("model", "experts"), what, hint)


def _updates(s: Scenario, b: Balancer) -> Iterator[Problem]:
    if b.update_timeout_s >= s.timeout_s:
        what = f"an update may take {b.update_timeout_s:g} s and the whole run only {s.timeout_s:g} s"
        yield Problem(("balancer", "update_timeout_s"), what, "make it smaller than timeout_s")
    # Scripted calls have a balancer on one rank too.
    if b.layer_updates_per_iter == 0 or (s.ranks == 1 and s.calls is None and not b.alone):
        return
    if s.model.layers == 1 and b.commit_delay < 2:
        what = "with one layer there is no other layer behind which a move could hide"
        yield Problem(("balancer", "commit_delay"), what, "commit_delay: 2")
    needed = b.warm_up + b.commit_delay + 1
    if s.calls is None and s.iterations < needed:
        what = f"nothing can move in {s.iterations} iterations: the first commit needs {needed}"
        why = f"warm_up {b.warm_up} + commit_delay {b.commit_delay} + 1"
        yield Problem(("iterations",), f"{what} ({why})", f"iterations: {needed} or more")


def _weights_from(s: Scenario, b: Balancer) -> Iterator[Problem]:
    if b.weights_from == "peer" and b.state != "device":
        what = "a slot that another rank reads would be overwritten in place while the state lives on the host"
        yield Problem(("balancer", "weights_from"), what, "state: device")


def _reduction(s: Scenario, b: Balancer) -> Iterator[Problem]:
    if b.reduction == "layer":
        return
    loc: Loc = ("balancer", "reduction")
    if b.state != "device":
        yield Problem(loc, "with the state on the host each layer sums and votes by itself", "state: device")
    if s.overlap == "before":
        yield Problem(loc, "overlap 'before' has no sum of its own that could wait for the end", "overlap: after")
    elif s.calls is None and s.statistics_path != "local_ids":
        what = f"with statistics {s.statistics_path!r} counts or votes ride in an exchange that each layer makes"
        yield Problem(loc, what, "statistics: local_ids")
    if b.commit_delay < 2:
        what = "with one reduction an iteration a plan is voted on at the end of the iteration after its hand-over"
        yield Problem(("balancer", "commit_delay"), f"{what}: {b.commit_delay} is too early", "commit_delay: 2")


def _policy(s: Scenario, b: Balancer) -> Iterator[Problem]:
    if b.moves_per_update is not None and b.policy == "reference":
        what = "the reference's rules know no budget of moves: they place every expert anew"
        yield Problem(("balancer", "moves_per_update"), what, "policy: incremental, or spare_slots")
    elif not b.preserve_slots and b.policy != "reference":
        what = f"policy {b.policy!r} always keeps an expert in its slot where it stays on its rank"
        yield Problem(("balancer", "preserve_slots"), what, "remove it")


def _assignments(s: Scenario, b: Balancer) -> Iterator[Problem]:
    if b.initial_global_assignments is None:
        return
    loc: Loc = ("balancer", "initial_global_assignments")
    missing = sorted(set(range(s.model.layers)) - set(b.initial_global_assignments))
    if missing:
        yield Problem(loc, f"layers without an assignment: {_some(missing)}", "give every layer one, or none of them")
    for layer, experts in b.initial_global_assignments.items():
        if not 0 <= layer < s.model.layers:
            yield Problem((*loc, layer), f"there is no layer {layer}: layers are 0 to {s.model.layers - 1}")
        if len(experts) != s.slots:
            yield Problem((*loc, layer), f"layer {layer} assigns {len(experts)} slots, there are {s.slots}")
        if unknown := sorted({e for e in experts if e >= s.model.experts}):
            yield Problem((*loc, layer), f"there are no experts {_some(unknown)}: the last is {s.model.experts - 1}")
        if absent := sorted(set(range(s.model.experts)) - set(experts)):
            yield Problem((*loc, layer), f"layer {layer} has no slot for experts {_some(absent)}")


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{shown} and {len(numbers) - 5} more" if len(numbers) > 5 else shown
