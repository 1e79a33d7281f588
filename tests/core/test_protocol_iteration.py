from __future__ import annotations

from typing import Any

import pytest

from moe_eplb.core.protocol import Illegal, IterCall, IterState, all_layers, iter_step, violation

LAYERS = 3
BETWEEN = IterState(next_iteration=4, in_iter=False)
INSIDE = iter_step(BETWEEN, "start_iter", layers=LAYERS)


def run_layers(state: IterState, *layers: int) -> IterState:
    for layer in layers:
        state = iter_step(state, "layer", layers=LAYERS, layer=layer)
    return state


def test_an_iteration_runs_every_layer_in_order_and_counts_up() -> None:
    assert iter_step(run_layers(INSIDE, 0, 1, 2), "end_iter", layers=LAYERS) == IterState(5, False)


def test_all_layers_at_once_are_all_of_them_in_order() -> None:
    assert all_layers(INSIDE, LAYERS) == run_layers(INSIDE, 0, 1, 2)
    assert all_layers(INSIDE, 0) == INSIDE
    for state, code in ((BETWEEN, "E122"), (run_layers(INSIDE, 0), "E123"), (run_layers(INSIDE, 0, 1, 2), "E123")):
        with pytest.raises(Illegal) as caught:
            all_layers(state, LAYERS)
        assert violation(-1, 4, caught.value).code == code


@pytest.mark.parametrize("begun", [(), (0,), (0, 1, 2)])
def test_an_abort_is_legal_anywhere_in_an_iteration_and_leaves_it_clean(begun: tuple[int, ...]) -> None:
    aborted = iter_step(run_layers(INSIDE, *begun), "abort_iter", layers=LAYERS)
    assert aborted == IterState(5, False)
    assert iter_step(aborted, "start_iter", layers=LAYERS, iteration=5).in_iter


@pytest.mark.parametrize(
    ("code", "state", "call", "arguments", "named"),
    [
        ("E120", INSIDE, "start_iter", {}, ""),
        ("E121", BETWEEN, "end_iter", {}, ""),
        ("E121", BETWEEN, "abort_iter", {}, ""),
        ("E122", BETWEEN, "layer", {"layer": 0}, ""),
        ("E123", INSIDE, "layer", {"layer": 1}, "layer 1"),
        ("E123", run_layers(INSIDE, 0), "layer", {"layer": 0}, "layer 0"),
        ("E123", run_layers(INSIDE, 0, 1, 2), "layer", {"layer": 0}, "layer 0"),
        ("E124", INSIDE, "end_iter", {}, "0, 1, 2"),
        ("E124", run_layers(INSIDE, 0, 1), "end_iter", {}, "2"),
        ("E125", run_layers(INSIDE, 0, 1, 2), "end_iter", {"unfinished": (1,)}, "1"),
        ("E126", BETWEEN, "start_iter", {"iteration": 6}, "6"),
        ("E126", BETWEEN, "start_iter", {"iteration": 3}, "3"),
    ],
)
def test_an_illegal_order_of_iterations_has_its_code(
    code: str, state: IterState, call: IterCall, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(Illegal) as caught:
        iter_step(state, call, layers=LAYERS, **arguments)
    error = violation(-1, 4, caught.value)
    assert error.code == code
    assert error.what.startswith(f"iteration 4: {'start_wait_gpu_stage' if call == 'layer' else call}: ")
    assert named in error.what
    assert error.hint
    assert "legal now: " in error.why


def test_static_routing_has_iterations_without_layers() -> None:
    assert iter_step(iter_step(BETWEEN, "start_iter", layers=0), "end_iter", layers=0) == IterState(5, False)
