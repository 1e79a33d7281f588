"""Exhaustive search of the protocol: every reachable state, and the shortest way to every violation.

Call counts are cut off at a bound, which makes the search finite. It stays exact for any bound from 1 up, since the
rules only ask whether a count is zero.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Generic, NamedTuple, TypeVar

from moe_eplb.core.protocol import INITIAL, TABLE, Call, Illegal, IterCall, IterState, LayerState, iter_step, step
from moe_eplb.core.protocol_iteration import ITERATION_ROWS

__all__ = ["CODES", "Exploration", "IterMove", "Move", "explore", "explore_iterations", "unreached"]

CODES = frozenset(row.code for rows in TABLE.values() for row in rows) | frozenset(ITERATION_ROWS)
"""Codes of every violation of the protocol."""

State = TypeVar("State", bound=Hashable)
Step = TypeVar("Step")

_STAGED = (
    Call.UPDATE_LOCAL_STATISTIC,
    Call.UPDATE_STATISTIC_WITH_LOCAL_IDS,
    Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS,
)


class Move(NamedTuple):
    """A stage call with its is_first_stage and is_last_stage."""

    call: Call
    first: bool = True
    last: bool = True

    def __str__(self) -> str:
        flags = f"(is_first_stage={self.first}, is_last_stage={self.last})" if self.call in _STAGED else "()"
        return self.call.name.lower() + flags


class IterMove(NamedTuple):
    """A call of the iteration level, with the arguments that `iter_step` takes."""

    call: IterCall
    layer: int = -1
    iteration: int | None = None
    unfinished: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Exploration(Generic[State, Step]):
    """What a search found.

    Attributes:
        states: Every reachable state.
        transitions: Number of legal moves out of these states.
        violations: By code, a shortest sequence of moves whose last one is the violation.
        dead_ends: States in which nothing is legal.
        stranded: States from which no sequence leads back to the start.
    """

    states: frozenset[State]
    transitions: int
    violations: dict[str, tuple[Step, ...]]
    dead_ends: frozenset[State]
    stranded: frozenset[State]


def explore(*, dynamic: bool, bound: int = 2) -> Exploration[LayerState, Move]:
    """Search all calls of one layer.

    Args:
        dynamic: Whether the layer has dynamic routing.
        bound: Where call counts are cut off, at least 1.
    """

    def apply(state: LayerState, move: Move) -> LayerState:
        after = step(state, move.call, dynamic=dynamic, first=move.first, last=move.last)
        return after._replace(counts=tuple(min(count, bound) for count in after.counts))

    return _search(INITIAL, tuple(_moves()), apply)


def explore_iterations(*, layers: int = 2) -> Exploration[IterState, IterMove]:
    """Search all calls of the iterations of a model with `layers` dynamic layers. Iterations are not told apart."""

    def apply(state: IterState, move: IterMove) -> IterState:
        after = iter_step(
            state, move.call, layers=layers, layer=move.layer, iteration=move.iteration, unfinished=move.unfinished
        )
        return after._replace(next_iteration=0)

    ends = [IterMove("end_iter"), IterMove("end_iter", unfinished=(layers - 1,))]
    starts = [IterMove("start_iter"), IterMove("start_iter", iteration=1)]
    turns = [IterMove("layer", layer=layer) for layer in range(layers)]
    return _search(IterState(0, False), (*starts, *turns, *ends, IterMove("abort_iter")), apply)


def unreached(
    explorations: Iterable[Exploration[LayerState, Move] | Exploration[IterState, IterMove]],
) -> frozenset[str]:
    """Codes that none of the searches met: rules that no sequence of calls can break."""
    return CODES.difference(*(exploration.violations for exploration in explorations))


def _moves() -> Iterable[Move]:
    for call in Call:
        if call in _STAGED:
            yield from (Move(call, first, last) for first, last in product((True, False), repeat=2))
        else:
            yield Move(call)


def _search(start: State, moves: tuple[Step, ...], apply: Callable[[State, Step], State]) -> Exploration[State, Step]:
    """Breadth first from `start`; `apply` gives the next state or raises `Illegal`."""
    paths: dict[State, tuple[Step, ...]] = {start: ()}
    sources: defaultdict[State, set[State]] = defaultdict(set)
    violations: dict[str, tuple[Step, ...]] = {}
    alive: set[State] = set()
    transitions = 0
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for move in moves:
            path = (*paths[state], move)
            try:
                after = apply(state, move)
            except Illegal as error:
                violations.setdefault(error.code, path)
                continue
            alive.add(state)
            transitions += 1
            sources[after].add(state)
            if after not in paths:
                paths[after] = path
                waiting.append(after)
    states, returning = frozenset(paths), _leading_to(start, sources)
    return Exploration(states, transitions, violations, states - alive, states - returning)


def _leading_to(goal: State, sources: defaultdict[State, set[State]]) -> frozenset[State]:
    """States from which `goal` can be reached, itself included."""
    found, waiting = {goal}, deque([goal])
    while waiting:
        fresh = sources[waiting.popleft()] - found
        found |= fresh
        waiting.extend(fresh)
    return frozenset(found)
