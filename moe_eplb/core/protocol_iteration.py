"""The legal order of iterations, and of the layers within one."""

from __future__ import annotations

from typing import Literal, NamedTuple

from moe_eplb.core.protocol_table import INITIAL, Call, Illegal, Row

__all__ = ["ITERATION_ROWS", "IterCall", "IterState", "IterationIllegal", "all_layers", "iter_step"]

IterCall = Literal["start_iter", "end_iter", "abort_iter", "layer"]
"""A call that moves the iteration on; "layer" is the start_wait_gpu_stage of a layer with dynamic routing."""


class IterState(NamedTuple):
    """`next_iteration`: the iteration under way or the next one. `layers_run`: how many layers have begun in it."""

    next_iteration: int
    in_iter: bool
    layers_run: int = 0


def _never(_: object) -> bool:
    return False


# What the iteration level needs; `iter_step` tells which row is broken, since rows alone do not see the layer's number.
ITERATION_ROWS: dict[str, Row] = {
    code: Row(code, needs, reason, hint, _never)
    for code, needs, reason, hint in (
        ("E120", "no iteration under way", "the iteration before has not ended", "call end_iter or abort_iter first"),
        ("E121", "an iteration under way", "no iteration is under way", "call start_iter once for each execution"),
        ("E122", "an iteration under way", "the layer runs outside an iteration",
         "wrap the forward in MoeLoadBalancerIterContext(balancer)"),
        ("E123", "the next layer in order of registration", "the layer runs out of turn or a second time",
         "every layer with dynamic routing runs once an iteration, in the order in which it was added"),
        ("E124", "every layer has run", "the iteration ends with layers missing",
         "run every layer of the model, or leave the iteration with abort_iter"),
        ("E125", "every layer handed over", "the iteration ends in the middle of a layer",
         "finish the layer with done_set_cpu_stage, or leave the iteration with abort_iter"),
        ("E126", "consecutive iterations", "the iteration is not the next one", "start iterations one after the other"),
    )
}  # fmt: skip


class IterationIllegal(Illegal):
    """A call that the order of iterations or layers forbids."""

    def __init__(self, state: IterState, call_name: str, code: str, detail: str, legal: tuple[str, ...]) -> None:
        super().__init__(INITIAL, Call.START_WAIT_GPU_STAGE, ITERATION_ROWS[code], ())
        self.call_name, self.legal = call_name, legal
        self.reason = f"{ITERATION_ROWS[code].reason}{f' ({detail})' if detail else ''}"
        where = f"in iteration {state.next_iteration}" if state.in_iter else f"before iteration {state.next_iteration}"
        self.state_text = f"{where}, layers run: {state.layers_run}"


def iter_step(
    state: IterState,
    call: IterCall,
    *,
    layers: int,
    layer: int = -1,
    iteration: int | None = None,
    unfinished: tuple[int, ...] = (),
) -> IterState:
    """The state after an iteration's call.

    Args:
        state: Where the iterations are.
        call: What happens.
        layers: How many layers have dynamic routing.
        layer: The layer that begins, for "layer".
        iteration: The iteration's number where "start_iter" names one.
        unfinished: At "end_iter", layers that have begun and not handed over.

    Raises:
        Illegal: The call is out of order.
    """
    if call == "start_iter":
        return _start(state, iteration)
    if call == "abort_iter":
        _require(state.in_iter, state, call, "E121", "", ("start_iter",))
        return IterState(state.next_iteration + 1, False)
    if call == "end_iter":
        return _end(state, layers, unfinished)
    return _layer(state, layer, layers)


def all_layers(state: IterState, layers: int) -> IterState:
    """The state after all layers have begun in order, as after `iter_step` for each of them."""
    if not layers:
        return state
    return iter_step(state, "layer", layers=layers, layer=0)._replace(layers_run=layers)


def _start(state: IterState, iteration: int | None) -> IterState:
    _require(not state.in_iter, state, "start_iter", "E120", "", ("end_iter", "abort_iter"))
    named = state.next_iteration if iteration is None else iteration
    detail = f"{named} was started, {state.next_iteration} is next"
    _require(named == state.next_iteration, state, "start_iter", "E126", detail, ("start_iter",))
    return IterState(state.next_iteration, True)


def _end(state: IterState, layers: int, unfinished: tuple[int, ...]) -> IterState:
    _require(state.in_iter, state, "end_iter", "E121", "", ("start_iter",))
    missing = list(range(state.layers_run, layers))
    detail = f"layers {missing} of {layers} did not run"
    legal = ("abort_iter", f"start_wait_gpu_stage of layer {state.layers_run}")
    _require(not missing, state, "end_iter", "E124", detail, legal)
    _require(not unfinished, state, "end_iter", "E125", f"layers {list(unfinished)}", ("abort_iter",))
    return IterState(state.next_iteration + 1, False)


def _layer(state: IterState, layer: int, layers: int) -> IterState:
    _require(state.in_iter, state, "start_wait_gpu_stage", "E122", "", ("start_iter",))
    following = f"start_wait_gpu_stage of layer {state.layers_run}" if state.layers_run < layers else "end_iter"
    detail = f"layer {layer}, expected {'none' if state.layers_run >= layers else state.layers_run}"
    _require(layer == state.layers_run, state, "start_wait_gpu_stage", "E123", detail, (following, "abort_iter"))
    return state._replace(layers_run=layer + 1)


def _require(met: bool, state: IterState, call: str, code: str, detail: str, legal: tuple[str, ...]) -> None:
    if not met:
        raise IterationIllegal(state, call, code, detail, legal)
