"""What a scenario takes of memory and how long its moves take, said before anything runs.

Plain arithmetic: sizes are those of `moe_eplb.moe.experts`, `moe_eplb.models` and `moe_eplb.balancer.host_weights`, and
tests hold them to the byte against what runs measure.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_eplb.core.dtypes import ITEM_BYTES, expert_tensor_bytes, state_dtype
from moe_eplb.core.scenario_model import Scenario
from moe_eplb.core.schedule import update_groups

__all__ = ["Memory", "MoveTime", "memory_of", "move_time"]

_HOST_ALIGN = 256


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a scenario takes, and the updates that it makes; where no expert moves, only the first three.

    Attributes:
        slots_bytes: Weights in the slots of one rank, all layers.
        router_bytes: Routers of one rank.
        shared_bytes: Shared experts of one rank.
        staging_bytes: The most that one rank holds of weights on their way into slots; with the balancer's state on the
            device, its spare slots.
        host_bytes: Host copies of all experts, once for the node.
        host_share_bytes: The most of them that one rank writes.
        shm_bytes: What they take of /dev/shm, which gives whole pages.
        update_bytes: What the update of one layer copies to one rank at worst, when all slots change that may.
        largest_group: The most updates that begin in one iteration.
        commit_delay: Iterations from an update's hand-over to the layer's next use.
        moves_per_step: How many updates must be copied in the time of a step so that none is waited for.
    """

    slots_bytes: int
    router_bytes: int
    shared_bytes: int
    staging_bytes: int = 0
    host_bytes: int = 0
    host_share_bytes: int = 0
    shm_bytes: int = 0
    update_bytes: int = 0
    largest_group: int = 0
    commit_delay: int = 0
    moves_per_step: float = 0.0

    @property
    def rank_bytes(self) -> int:
        """All of one rank, at most."""
        return self.slots_bytes + self.router_bytes + self.shared_bytes + self.staging_bytes


@dataclass(frozen=True, slots=True)
class MoveTime:
    """How long the move of one layer takes at worst, at an assumed bandwidth in 10^9 bytes a second.

    Attributes:
        bandwidth_gb_s, step_ms: What was assumed; no step time is an answer too.
        move_ms: One layer's update.
        shortest_step_ms: With steps as long as this, or longer, no update is waited for.
        window_ms: From hand-over to next use, None without a step time.
        fits: Whether `step_ms` is long enough, None without one.
    """

    bandwidth_gb_s: float
    step_ms: float | None
    move_ms: float
    shortest_step_ms: float
    window_ms: float | None
    fits: bool | None


def memory_of(scenario: Scenario) -> Memory:
    """What the scenario takes: per rank in the model, per node in host memory, and per update."""
    moving = scenario.balancer_off_reason() is None
    # Scripted calls have slots only for what may move, and neither router nor shared expert.
    model = scenario.calls is None
    held = Memory(
        slots_bytes=scenario.model.layers * _layer_slots_bytes(scenario) if model or moving else 0,
        router_bytes=_router_bytes(scenario) if model else 0,
        shared_bytes=_shared_bytes(scenario) if model else 0,
    )
    return _with_moves(scenario, held) if moving else held


def move_time(memory: Memory, *, bandwidth_gb_s: float, step_ms: float | None = None) -> MoveTime | None:
    """Time of a move if nothing else takes from the bandwidth; None where nothing moves."""
    if not memory.update_bytes:
        return None
    move_ms = memory.update_bytes / (bandwidth_gb_s * 1e9) * 1e3
    shortest = move_ms * memory.moves_per_step
    window = None if step_ms is None else step_ms * memory.commit_delay
    fits = None if step_ms is None else step_ms >= shortest
    return MoveTime(bandwidth_gb_s, step_ms, move_ms, shortest, window, fits)


def _with_moves(scenario: Scenario, held: Memory) -> Memory:
    assert scenario.balancer is not None
    layers, delay = scenario.model.layers, scenario.balancer.commit_delay
    updates, empty = scenario.balancer.layer_updates_per_iter, scenario.balancer.empty_group
    groups = update_groups(layers, updates, empty_group=empty)
    update = _update_bytes(scenario)
    # One more than are pending: the updater is still at one that was given up, or keeps the last one it finished.
    staged = _most_pending(layers, groups, delay) + 1
    shares = _host_shares(scenario)
    pages = sum(-(-share // mmap.PAGESIZE) * mmap.PAGESIZE for share in shares)
    return replace(
        held,
        staging_bytes=(layers if scenario.balancer.state == "device" else staged) * update,
        host_bytes=layers * sum(shares),
        host_share_bytes=layers * max(shares),
        shm_bytes=layers * pages,
        update_bytes=update,
        largest_group=len(groups[0]),
        commit_delay=delay,
        moves_per_step=_moves_per_step(layers, groups, delay),
    )


def _layer_slots_bytes(scenario: Scenario) -> int:
    """All slots of one layer on one rank."""
    model = scenario.model
    return scenario.slots_per_rank * sum(expert_tensor_bytes(model.dtype, model.hidden, model.intermediate))


def _update_bytes(scenario: Scenario) -> int:
    """The slots of one layer on one rank that a plan can change."""
    assert scenario.balancer is not None
    spare = scenario.balancer.spare_slots
    changed = scenario.slots_per_rank if spare is None else min(spare, scenario.slots_per_rank)
    return _layer_slots_bytes(scenario) // scenario.slots_per_rank * changed


def _router_bytes(scenario: Scenario) -> int:
    """[E, D], in float32 where no checkpoint says otherwise; deepseek_v3 has a bias [E] where its router chooses."""
    model = scenario.model
    item = ITEM_BYTES[state_dtype(model.dtype) if model.hf is not None else "float32"]
    biased = model.routing.method == "deepseek_v3" and scenario.workload.kind == "model"
    return model.layers * model.experts * (model.hidden * item + (ITEM_BYTES["float32"] if biased else 0))


def _shared_bytes(scenario: Scenario) -> int:
    """The shared experts; of the checkpoints that have one, all but deepseek_v3's have a gate [1, D] too."""
    model = scenario.model
    if not model.shared_intermediate:
        return 0
    gate = model.hidden if model.hf is not None and model.routing.method != "deepseek_v3" else 0
    dtype = state_dtype(model.dtype)
    expert = sum(expert_tensor_bytes(dtype, model.hidden, model.shared_intermediate))
    return model.layers * (expert + gate * ITEM_BYTES[dtype])


def _host_shares(scenario: Scenario) -> list[int]:
    """For each rank, its part of one layer's host copies, whose tensors are aligned; 0 where slots are copied from."""
    model, ranks = scenario.model, scenario.ranks
    if scenario.balancer is not None and scenario.balancer.weights_from == "peer":
        return [0] * ranks
    sizes = expert_tensor_bytes(model.dtype, model.hidden, model.intermediate)
    expert = sum(-(-size // _HOST_ALIGN) * _HOST_ALIGN for size in sizes)
    return [((rank + 1) * model.experts // ranks - rank * model.experts // ranks) * expert for rank in range(ranks)]


def _most_pending(layers: int, groups: Sequence[Sequence[int]], delay: int) -> int:
    """The most updates that are handed over and not yet committed: a layer commits before it hands over again."""
    if delay >= len(groups):
        return layers
    due: dict[int, int] = {}
    most = 0
    for iteration in range(len(groups) + delay + 1):
        group = set(groups[iteration % len(groups)])
        for layer in sorted(group | {layer for layer, when in due.items() if when == iteration}):
            if due.get(layer) == iteration:
                del due[layer]
            if layer in group:
                due[layer] = iteration + delay
            most = max(most, len(due))
    return most


def _moves_per_step(layers: int, groups: Sequence[Sequence[int]], delay: int) -> float:
    """Updates a step that one link must copy, so that each is there after `delay` steps, in the order they came.

    The updates of n iterations in a row must be copied in n - 1 + delay steps. Most crowded are the iterations of the
    largest groups, which come first in the cycle, or all of them in the long run. A layer whose update is pending sits
    out its turn, so that it takes part every ceil(delay / cycle) cycles.
    """
    largest = len(groups[0])
    crowded = sum(len(group) == largest for group in groups)
    cycle = len(groups)
    return max(crowded * largest / (crowded - 1 + delay), layers / (cycle * -(-delay // cycle)))
