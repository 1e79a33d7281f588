"""Planners for a layer while it runs: from its load and placement to a plan, the same on every rank.

Nothing here looks at a clock: ranks that plan for themselves must come to the same placement, however busy each is. A
planner is bounded by the slots that it may change, or, where slots move only if that pays, by a plan of them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from moe_eplb.core import planner as reference
from moe_eplb.core.partial_plan import part_of
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.core.scenario import Scenario
from moe_eplb.planning.problem import Problem, gains

__all__ = ["HISTORY", "OnlinePolicy", "Planner", "Planning", "prepare", "prepare_for"]

OnlinePolicy = Literal["reference", "incremental", "robust"]
Planner: TypeAlias = Callable[[np.ndarray, Placement], Plan]
"""From a load [E] and the placement that is there to a plan. May remember what it was asked before."""
HISTORY = 8
"""Loads of a layer that ``robust`` plans from."""


@dataclass(frozen=True, slots=True)
class Planning:
    """How the layers of a model are planned.

    Attributes:
        policy: ``reference`` (TensorRT-LLM's rules, from scratch), ``incremental`` (as balanced as a plan from scratch,
            with as few moves as that takes) or ``robust`` (for a load estimated from the layer's last loads).
        preserve_slots: With ``reference``, an expert that stays on a rank stays in its slot; the others always do so.
        most_changes: How many slots of each rank a plan changes at most; None for all.
        moves: How many slots a plan changes at most, over all ranks; not with ``reference``. None for all.
        compiled: Whether ``reference`` runs compiled, so that it holds no other thread; the plans are the same.
        min_gain: Share by which the balancedness of the load has to grow for slots to move; otherwise a plan keeps what
            is there. Of a plan in parts the whole has to bring as much, and no part may make the layer less balanced.
            Without it a balanced layer's slots go on moving after the noise of each load.
    """

    policy: OnlinePolicy = "reference"
    preserve_slots: bool = True
    most_changes: int | None = None
    moves: int | None = None
    compiled: bool = False
    min_gain: float = 0.0

    def planner(self) -> Planner:
        """A planner for one layer."""
        loads: deque[np.ndarray] = deque(maxlen=HISTORY if self.policy == "robust" else 1)
        return partial(self._remembering, loads)

    def _remembering(self, loads: deque[np.ndarray], load: np.ndarray, current: Placement) -> Plan:
        reference.check_load(load, current.slots)
        loads.append(np.asarray(load, np.float64))
        return self._where_it_pays(loads, current) if self.min_gain else self._made(loads, current)

    def _where_it_pays(self, loads: deque[np.ndarray], current: Placement) -> Plan:
        """The whole plan is made first: where it does not pay, no part of it has to be found."""
        found = replace(self, most_changes=None, moves=None)._made(loads, current)
        now = current.rank_load(loads[-1])
        pays = bool(gains(now.max(keepdims=True), found.predicted.max(keepdims=True))[0] >= self.min_gain)
        if pays and (self.most_changes is not None or self.moves is not None):
            found = self._made(loads, current)
            pays = float(found.predicted.max()) <= float(now.max())
        return found if pays else Plan(current, current.changed_slots(current), now)

    def _made(self, loads: deque[np.ndarray], current: Placement) -> Plan:
        if self.policy != "reference":
            return self._from_current(loads, current)
        return (self._compiled if self.compiled else self._by_the_twin)(loads[-1], current)

    def _by_the_twin(self, load: np.ndarray, current: Placement) -> Plan:
        return reference.plan(load, current, preserve_slots=self.preserve_slots, most_changes=self.most_changes)

    def _compiled(self, load: np.ndarray, current: Placement) -> Plan:
        from moe_eplb.planning.kernels.reference import reference_slots

        slots = reference_slots(
            np.ascontiguousarray(load, np.float64), current.slot_to_expert, current.ranks, self.preserve_slots
        )
        return self._plan(load, current, slots)

    def _from_current(self, loads: deque[np.ndarray], current: Placement) -> Plan:
        from moe_eplb.planning.policies import solve

        problem = Problem(
            np.stack(loads)[:, np.newaxis], current.ranks, current.slots, current=current.slot_to_expert[np.newaxis],
            max_moves=self.moves, allow_duplicates=_has_duplicates(current),
        )  # fmt: skip
        return self._plan(loads[-1], current, solve(problem, self.policy).slots[0])

    def _plan(self, load: np.ndarray, current: Placement, slots: np.ndarray) -> Plan:
        placement = Placement(current.ranks, current.experts, slots)
        if self.most_changes is not None:
            placement = part_of(current, placement, load, self.most_changes)
        return Plan(placement, placement.changed_slots(current), placement.rank_load(load))


def prepare(planning: Planning) -> None:
    """Compile what the policy needs, or load what was compiled before, so that the first plan does not wait for it."""
    if planning.policy == "reference" and not planning.compiled:
        return
    current = Placement(2, 4, np.array([0, 1, 2, 3, 0, 1], np.int32))
    planning.planner()(np.array([3.0, 1.0, 2.0, 5.0]), current)


def prepare_for(scenarios: Iterable[Scenario]) -> None:
    """Compile what the scenarios' balancers need, once and for all ranks to load.

    Left to the ranks, they would compile it all together, for long and within the scenario's timeout.
    """
    for options in (scenario.balancer for scenario in scenarios):
        if options is not None and options.layer_updates_per_iter and options.policy != "reference":
            prepare(Planning(options.policy))


def _has_duplicates(placement: Placement) -> bool:
    """Whether some rank holds an expert twice: then it may, for to repair that takes moves that bring no balance."""
    rows = np.sort(placement.slot_to_expert.reshape(placement.ranks, -1), axis=1)
    return bool((rows[:, 1:] == rows[:, :-1]).any())
