"""Replays the recorded calls of every rank through the rules of the balancer's API (`moe_eplb.core.protocol`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from moe_eplb.analysis.trace import Records, Trace
from moe_eplb.core.events import KINDS, Kind
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

__all__ = ["Replay", "Violation", "replay"]

_ITERATION_CALLS: dict[Kind, IterCall] = {
    Kind.START_ITER: "start_iter",
    Kind.END_ITER: "end_iter",
    Kind.ABORT_ITER: "abort_iter",
}
_FIRST, _LAST, _DYNAMIC = 1, 2, 4
_NEIGHBOURS = 3

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
    recorded = trace.records.host.where(trace.records.host.kind <= Kind.ABORT_ITER)
    for rank, records in recorded.by_rank():
        machine = _Machine(dynamic_layers)
        outcome.calls[rank] = int((records.kind <= Kind.DONE_SET_CPU_STAGE).sum())
        found = _first_violation(rank, records, machine)
        if found is not None:
            outcome.violations.append(found)
        elif machine.iterations.in_iter:
            outcome.unfinished[rank] = f"iteration {machine.iterations.next_iteration} never ended"
    return outcome


class _Machine:
    """The state of one rank's balancer, as its calls so far have made it."""

    def __init__(self, dynamic_layers: int) -> None:
        self._dynamic_layers = dynamic_layers
        self._layers: dict[int, LayerState] = {}
        self.iterations = IterState(next_iteration=0, in_iter=False)

    def iteration_call(self, kind: Kind, iteration: int) -> None:
        """Make a call of the iteration; `Illegal` where the rules forbid it."""
        unfinished = tuple(layer for layer, state in sorted(self._layers.items()) if state.phase is not Phase.IDLE)
        self.iterations = iter_step(
            self.iterations,
            _ITERATION_CALLS[kind],
            layers=self._dynamic_layers,
            iteration=iteration,
            unfinished=unfinished,
        )
        if kind is Kind.ABORT_ITER:
            self._layers.clear()

    def stage_call(self, call: Call, layer: int, flags: int) -> None:
        """Make a stage call with the flags of its record; `Illegal` where the rules forbid it."""
        dynamic = bool(flags & _DYNAMIC)
        if call is Call.START_WAIT_GPU_STAGE and dynamic:
            self.iterations = iter_step(self.iterations, "layer", layers=self._dynamic_layers, layer=layer)
        state = self._layers.get(layer, INITIAL)
        first, last = bool(flags & _FIRST), bool(flags & _LAST)
        self._layers[layer] = step(state, call, dynamic=dynamic, first=first, last=last)


def _first_violation(rank: int, records: Records, machine: _Machine) -> Violation | None:
    columns = (records.kind, records.layer, records.iteration, records.a)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    for index, (kind, layer, iteration, flags) in enumerate(rows):
        try:
            if kind <= Kind.DONE_SET_CPU_STAGE:
                machine.stage_call(Call(kind), layer, flags)
            else:
                machine.iteration_call(Kind(kind), iteration)
        except Illegal as illegal:
            error = violation(layer, iteration, illegal)
            return Violation(
                rank, int(records.seq[index]), error.code, error.what, error.why, error.hint,
                before=_names(rows[max(0, index - _NEIGHBOURS) : index]),
                after=_names(rows[index + 1 : index + 1 + _NEIGHBOURS]),
            )  # fmt: skip
    return None


def _names(rows: Sequence[_Row]) -> tuple[str, ...]:
    return tuple(
        f"{KINDS[Kind(kind)].name}" + (f" layer {layer}" if layer >= 0 else "") + f" iteration {iteration}"
        for kind, layer, iteration, _ in rows
    )
