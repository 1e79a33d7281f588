from __future__ import annotations

import pytest

from moe_eplb.core.explore import CODES, Exploration, IterMove, Move, explore, explore_iterations, unreached
from moe_eplb.core.protocol import INITIAL, Call, Illegal, IterState, LayerState, Path, Phase, iter_step, step


@pytest.fixture(scope="module")
def layers() -> dict[bool, Exploration[LayerState, Move]]:
    return {dynamic: explore(dynamic=dynamic) for dynamic in (True, False)}


@pytest.fixture(scope="module")
def iterations() -> Exploration[IterState, IterMove]:
    return explore_iterations(layers=3)


@pytest.mark.parametrize("dynamic", [True, False])
def test_no_reachable_state_of_a_layer_is_a_trap(
    layers: dict[bool, Exploration[LayerState, Move]], dynamic: bool
) -> None:
    found = layers[dynamic]
    assert INITIAL in found.states
    assert len(found.states) > 50
    assert (found.dead_ends, found.stranded) == (frozenset(), frozenset())


def test_every_path_of_statistics_leads_to_the_hand_over(layers: dict[bool, Exploration[LayerState, Move]]) -> None:
    handed = {state for state in layers[True].states if state.phase is Phase.RELEASING}
    assert all(state.reduced for state in handed)
    assert {state.path for state in handed} == set(Path)
    assert {step(state, Call.DONE_SET_CPU_STAGE, dynamic=True) for state in handed} == {INITIAL}


def test_no_reachable_state_of_the_iterations_is_a_trap(iterations: Exploration[IterState, IterMove]) -> None:
    assert iterations.states == {IterState(0, False), *(IterState(0, True, run) for run in range(4))}
    assert (iterations.dead_ends, iterations.stranded) == (frozenset(), frozenset())


def test_every_code_can_be_met(
    layers: dict[bool, Exploration[LayerState, Move]], iterations: Exploration[IterState, IterMove]
) -> None:
    assert unreached([*layers.values(), iterations]) == frozenset()
    assert unreached([layers[True]]) == frozenset(iterations.violations)
    assert unreached([]) == CODES


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_way_to_a_violation_is_legal_but_for_its_last_call(
    layers: dict[bool, Exploration[LayerState, Move]], dynamic: bool
) -> None:
    for code, moves in layers[dynamic].violations.items():
        state = INITIAL
        for move in moves[:-1]:
            state = step(state, move.call, dynamic=dynamic, first=move.first, last=move.last)
        with pytest.raises(Illegal) as caught:
            step(state, moves[-1].call, dynamic=dynamic, first=moves[-1].first, last=moves[-1].last)
        assert caught.value.code == code


def test_the_way_to_a_violation_of_the_iterations_leads_there(iterations: Exploration[IterState, IterMove]) -> None:
    for code, moves in iterations.violations.items():
        state = IterState(0, False)
        for move in moves[:-1]:
            state = iter_step(state, move.call, layers=3, layer=move.layer)
        last = moves[-1]
        with pytest.raises(Illegal) as caught:
            iter_step(
                state, last.call, layers=3, layer=last.layer, iteration=last.iteration, unfinished=last.unfinished
            )
        assert caught.value.code == code


def test_the_ways_are_the_shortest(layers: dict[bool, Exploration[LayerState, Move]]) -> None:
    lengths = {code: len(moves) for code, moves in layers[True].violations.items()}
    assert lengths == {
        "E101": 2, "E102": 1, "E103": 1, "E104": 4, "E105": 3, "E106": 4,
        "E107": 3, "E108": 3, "E109": 1, "E110": 3, "E111": 4, "E112": 1,
    }  # fmt: skip


def test_what_only_dynamic_routing_needs_is_never_asked_of_static_layers(
    layers: dict[bool, Exploration[LayerState, Move]],
) -> None:
    assert layers[True].violations.keys() - layers[False].violations.keys() == {"E110", "E111"}


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_bound_changes_neither_violations_nor_properties(
    layers: dict[bool, Exploration[LayerState, Move]], dynamic: bool
) -> None:
    narrow, wide = explore(dynamic=dynamic, bound=1), layers[dynamic]
    assert narrow.violations == wide.violations
    assert {state[0:1] + state[2:] for state in narrow.states} == {state[0:1] + state[2:] for state in wide.states}
    assert len(narrow.states) < len(wide.states)


def test_a_move_reads_as_it_is_written_in_code() -> None:
    assert str(Move(Call.ROUTE)) == "route()"
    written = "update_statistic_with_local_ids(is_first_stage=True, is_last_stage=False)"
    assert str(Move(Call.UPDATE_STATISTIC_WITH_LOCAL_IDS, True, False)) == written
