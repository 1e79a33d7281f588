"""Replays the recorded calls of every rank through the rules of the balancer's API (`moe_eplb.core.protocol`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from moe_eplb.analysis.trace import Records, Trace
from moe_eplb.core.events import CAPTURED, KINDS, Kind
from moe_eplb.core.protocol import (
    INITIAL,
    Call,
    Illegal,
    IterCall,
    IterState,
    LayerState,
    Phase,
    iter_step,
    step,
    violation,
)

__all__ = ["DYNAMIC", "FIRST", "LAST", "NEIGHBOURS", "Machine", "Replay", "Violation", "replay"]

_ITERATION_CALLS: dict[Kind, IterCall] = {
    Kind.START_ITER: "start_iter",
    Kind.END_ITER: "end_iter",
    Kind.ABORT_ITER: "abort_iter",
}
_CALLS = tuple(Call)
FIRST, LAST, DYNAMIC = 1, 2, 4
"""Flags of a stage call."""
NEIGHBOURS = 3
"""How many calls to show on either side of an illegal one."""

_Row: TypeAlias = tuple[int, int, int, int]
"""Kind, layer, iteration and flags of one call."""


@dataclass(frozen=True, slots=True)
class Violation:
    """The first illegal call of a rank, with the calls around it as the host made them."""

    rank: int
    seq: int
    code: str
    what: str
    why: str
    hint: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        calls = [f"    {call}" for call in self.before] + ["  > this call"] + [f"    {call}" for call in self.after]
        return "\n".join([f"rank {self.rank}, record {self.seq}: {self.code} {self.what} ({self.why})", *calls])


@dataclass
class Replay:
    """Outcome for all ranks. `calls` counts stage calls by rank, `unfinished` says what is open at the end."""

    calls: dict[int, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    unfinished: dict[int, str] = field(default_factory=dict)


def replay(trace: Trace, dynamic_layers: int) -> Replay:
    """Replay the host's calls, rank by rank; a rank's replay ends at its first violation.

    Args:
        dynamic_layers: Layers that every iteration must run; 0 when routing is static and there are no iterations.
    """
    outcome = Replay()
    host = trace.records.host
    recorded = host.where((host.kind <= Kind.ABORT_ITER) | np.isin(host.kind, [Kind.CAPTURE, Kind.REPLAY]))
    for rank, records in recorded.by_rank():
        outcome.calls[rank] = int((records.kind <= Kind.DONE_SET_CPU_STAGE).sum())
        captured = records.iteration == CAPTURED
        for made in (records.where(captured), records.where(~captured)):
            _replay_rank(rank, made, Machine(dynamic_layers), outcome)
    return outcome


def _replay_rank(rank: int, records: Records, machine: Machine, outcome: Replay) -> None:
    found = _first_violation(rank, records, machine)
    if found is not None:
        outcome.violations.append(found)
    elif machine.iterations.in_iter and machine.capturing:
        outcome.unfinished[rank] = f"a capture has {machine.iterations.layers_run} layers"
    elif machine.iterations.in_iter:
        outcome.unfinished[rank] = f"iteration {machine.iterations.next_iteration} never ended"


class Machine:
    """The state of one rank's balancer, as its calls so far have made it.

    Args:
        dynamic_layers: Layers that every iteration must run.
        next_iteration: The first iteration that is seen.
    """

    def __init__(self, dynamic_layers: int, next_iteration: int = 0) -> None:
        self._dynamic_layers = dynamic_layers
        self._layers: dict[int, LayerState] = {}
        self.iterations = IterState(next_iteration=next_iteration, in_iter=False)
        self.capturing = False

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Layers that have begun and were not handed over."""
        return tuple(layer for layer, state in sorted(self._layers.items()) if state.phase is not Phase.IDLE)

    def call(self, kind: int, layer: int, iteration: int, flags: int, *, replays: bool = False) -> None:
        """Make a call; `Illegal` where the rules forbid it.

        Args:
            replays: An iteration ends that replayed a graph, so that no layer of it was called.
        """
        if kind <= Kind.DONE_SET_CPU_STAGE:
            self._stage_call(_CALLS[kind], layer, flags)
        elif kind == Kind.CAPTURE:
            self._capture()
        elif kind == Kind.REPLAY:
            self._replay_graph()
        else:
            self._iteration_call(Kind(kind), iteration, 0 if replays else self._dynamic_layers)
        if self.capturing and self._dynamic_layers == self.iterations.layers_run and not self.unfinished:
            self.iterations = self.iterations._replace(in_iter=False)  # every layer has been captured

    def _capture(self) -> None:
        """A capture begins: a forward of all layers that nothing executes."""
        if self.capturing and self.iterations.in_iter:
            self._iteration_call(Kind.END_ITER, CAPTURED, self._dynamic_layers)
        self.capturing, self.iterations = True, IterState(CAPTURED, in_iter=True)

    def _replay_graph(self) -> None:
        """A graph of all layers stands in an iteration for their calls."""
        for layer in range(self._dynamic_layers):
            self.iterations = iter_step(self.iterations, "layer", layers=self._dynamic_layers, layer=layer)

    def _iteration_call(self, kind: Kind, iteration: int, layers: int) -> None:
        self.iterations = iter_step(
            self.iterations, _ITERATION_CALLS[kind], layers=layers, iteration=iteration, unfinished=self.unfinished
        )
        if kind is Kind.ABORT_ITER:
            self._layers.clear()

    def _stage_call(self, call: Call, layer: int, flags: int) -> None:
        dynamic = bool(flags & DYNAMIC)
        if call is Call.START_WAIT_GPU_STAGE and dynamic:
            self.iterations = iter_step(self.iterations, "layer", layers=self._dynamic_layers, layer=layer)
        state = self._layers.get(layer, INITIAL)
        first, last = bool(flags & FIRST), bool(flags & LAST)
        self._layers[layer] = step(state, call, dynamic=dynamic, first=first, last=last)


def _first_violation(rank: int, records: Records, machine: Machine) -> Violation | None:
    columns = (records.kind, records.layer, records.iteration, records.a)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    for index, (kind, layer, iteration, flags) in enumerate(rows):
        try:
            machine.call(kind, layer, iteration, flags)
        except Illegal as illegal:
            error = violation(layer, iteration, illegal)
            return Violation(
                rank, int(records.seq[index]), error.code, error.what, error.why, error.hint,
                before=_names(rows[max(0, index - NEIGHBOURS) : index]),
                after=_names(rows[index + 1 : index + 1 + NEIGHBOURS]),
            )  # fmt: skip
    return None


def _names(rows: Sequence[_Row]) -> tuple[str, ...]:
    return tuple(
        f"{KINDS[Kind(kind)].name}" + (f" layer {layer}" if layer >= 0 else "") + f" iteration {iteration}"
        for kind, layer, iteration, _ in rows
    )
