"""The legal order of the balancer's calls: one table, and the pure steps built from it.

The running balancer asserts it, recorded traces are replayed through it, `moe_eplb.core.explore` searches it, and the
documentation is printed from it. Per layer and iteration, after TensorRT-LLM's online EPLB::

    start_wait_gpu_stage -> done_wait_gpu_stage -> { statistics | route } once or more
        -> start_set_cpu_stage -> done_set_cpu_stage

with exactly one of three statistics paths: A update_local_statistic, get_local_statistic_tensor and
update_statistic_with_gathered_statistic; B update_statistic_with_local_ids; C update_statistic_with_global_ids.
"""

from __future__ import annotations

import functools

from moe_eplb.core.errors import ProtocolError
from moe_eplb.core.protocol_iteration import IterCall, IterState, all_layers, iter_step
from moe_eplb.core.protocol_table import (
    INITIAL,
    PATH_OF,
    TABLE,
    Call,
    Given,
    Illegal,
    LayerState,
    Path,
    Phase,
    Row,
)

__all__ = [
    "INITIAL",
    "TABLE",
    "Call",
    "Illegal",
    "IterCall",
    "IterState",
    "LayerState",
    "Path",
    "Phase",
    "Row",
    "all_layers",
    "iter_step",
    "legal_calls",
    "step",
    "violation",
]

_CACHED_STEPS = 1 << 14
_PHASE_AFTER = {
    Call.START_WAIT_GPU_STAGE: Phase.WAITING,
    Call.DONE_WAIT_GPU_STAGE: Phase.OWNED,
    Call.START_SET_CPU_STAGE: Phase.RELEASING,
}


@functools.lru_cache(maxsize=_CACHED_STEPS)
def step(state: LayerState, call: Call, *, dynamic: bool, first: bool = True, last: bool = True) -> LayerState:
    """The state of a layer after a call.

    Args:
        state: The layer's state, `INITIAL` at the start of an iteration and after an abort.
        call: The call.
        dynamic: Whether the layer has dynamic routing; static layers count their calls and need no statistics.
        first, last: is_first_stage and is_last_stage of a statistics call.

    Raises:
        Illegal: With the table's row that the call breaks.
    """
    given = Given(state, dynamic, first, last)
    for row in TABLE[call]:
        if row.broken(given):
            raise Illegal(state, call, row, legal_calls(state, dynamic=dynamic))
    return _after(state, call, last=last)


def legal_calls(state: LayerState, *, dynamic: bool) -> tuple[Call, ...]:
    """The calls that are legal now, with some first and last stage flags."""
    flags = [(first, last) for first in (False, True) for last in (False, True)]
    return tuple(
        call
        for call in Call
        if any(not any(row.broken(Given(state, dynamic, f, t)) for row in TABLE[call]) for f, t in flags)
    )


def violation(layer: int, iteration: int, error: Illegal) -> ProtocolError:
    """The error a user sees: layer, iteration, call, state, what is legal now, and a hint. Layer -1: the iteration."""
    place = f"iteration {iteration}" if layer < 0 else f"layer {layer}, iteration {iteration}"
    legal = ", ".join(error.legal) or "nothing but abort_iter"
    return ProtocolError(
        error.code,
        f"{place}: {error.call_name}: {error.reason}",
        why=f"state {error.state_text}; legal now: {legal}",
        hint=error.hint,
    )


def _after(state: LayerState, call: Call, *, last: bool) -> LayerState:
    if call is Call.DONE_SET_CPU_STAGE:
        return INITIAL
    counts = tuple(n + (i == call) for i, n in enumerate(state.counts))
    path = PATH_OF.get(call)
    if path is None:
        return state._replace(phase=_PHASE_AFTER.get(call, state.phase), counts=counts)
    reduced = call is Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC or (path is not Path.GATHERED and last)
    complete = state.complete or (call is not Call.GET_LOCAL_STATISTIC_TENSOR and last)
    fetched = state.fetched or (call is Call.GET_LOCAL_STATISTIC_TENSOR and state.complete)
    return LayerState(state.phase, counts, True, state.reduced or reduced, complete, path, fetched)
