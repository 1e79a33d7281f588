from __future__ import annotations

import pickle
import timeit

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moe_eplb.core.errors import ProtocolError
from moe_eplb.core.protocol import (
    INITIAL,
    Call,
    Illegal,
    LayerState,
    Phase,
    legal_calls,
    step,
    violation,
)

START_WAIT, DONE_WAIT, LOCAL, GET, GATHERED, LOCAL_IDS, GLOBAL_IDS, ROUTE, START_SET, DONE_SET = Call
COUNTING = {LOCAL: "A", LOCAL_IDS: "B", GLOBAL_IDS: "C"}
PATHS = COUNTING | {GET: "A", GATHERED: "A"}
HELD = (START_WAIT, DONE_WAIT)
FETCHED = (*HELD, LOCAL, GET)
REDUCED = (*FETCHED, GATHERED)
HANDED = (*REDUCED, START_SET)

Step = Call | tuple[Call, bool, bool]  # a bare statistics call is the first and the last stage


def walk(*steps: Step, dynamic: bool = True, state: LayerState = INITIAL) -> LayerState:
    for one in steps:
        call, first, last = one if isinstance(one, tuple) else (one, True, True)
        state = step(state, call, dynamic=dynamic, first=first, last=last)
    return state


def refusal(*steps: Step, dynamic: bool = True) -> Illegal:
    before = walk(*steps[:-1], dynamic=dynamic)
    with pytest.raises(Illegal) as caught:
        walk(steps[-1], dynamic=dynamic, state=before)
    return caught.value


@pytest.mark.parametrize(
    "middle",
    [
        (LOCAL, GET, GATHERED, ROUTE),
        (ROUTE, LOCAL, GET, GET, GATHERED, GET),
        (LOCAL_IDS, ROUTE),
        (ROUTE, GLOBAL_IDS),
        ((LOCAL, True, False), ROUTE, GET, (LOCAL, False, True), ROUTE, GET, GATHERED),
        ((LOCAL_IDS, True, False), ROUTE, (LOCAL_IDS, False, False), ROUTE, (LOCAL_IDS, False, True), ROUTE),
        ((GLOBAL_IDS, True, False), (GLOBAL_IDS, False, True), ROUTE, ROUTE),
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_legal_iteration_ends_where_it_began(middle: tuple[Step, ...], dynamic: bool) -> None:
    assert walk(*HELD, *middle, START_SET, DONE_SET, dynamic=dynamic) == INITIAL


@pytest.mark.parametrize(
    ("code", "steps"),
    [
        ("E101", (START_WAIT, START_WAIT)),
        ("E101", (*HELD, START_WAIT)),
        ("E101", (*HANDED, START_WAIT)),
        ("E102", (DONE_WAIT,)),
        ("E102", (*HELD, DONE_WAIT)),
        ("E102", (*HANDED, DONE_WAIT)),
        *[("E103", (call,)) for call in (*PATHS, ROUTE)],
        *[("E103", (START_WAIT, call)) for call in (*PATHS, ROUTE)],
        *[("E103", (*HANDED, call)) for call in (*PATHS, ROUTE)],
        *[("E104", (*HELD, a, b)) for a in COUNTING for b in PATHS if PATHS[a] != PATHS[b]],
        *[("E104", (*HELD, (a, True, False), b)) for a in COUNTING for b in PATHS if PATHS[a] != PATHS[b]],
        ("E104", (*REDUCED, LOCAL_IDS)),
        *[("E105", (*HELD, (call, False, last))) for call in COUNTING for last in (True, False)],
        *[("E105", (*HELD, (call, True, False), (call, True, True))) for call in COUNTING],
        *[("E106", (*HELD, call, (call, False, last))) for call in COUNTING for last in (True, False)],
        ("E106", (*REDUCED, (LOCAL, False, True))),
        ("E107", (*HELD, GET)),
        ("E108", (*HELD, GATHERED)),
        ("E108", (*HELD, LOCAL, GATHERED)),
        ("E108", (*HELD, (LOCAL, True, False), GET, GATHERED)),
        ("E108", (*HELD, (LOCAL, True, False), GET, (LOCAL, False, True), GATHERED)),
        ("E108", (*REDUCED, GATHERED)),
        ("E109", (START_SET,)),
        ("E109", (START_WAIT, START_SET)),
        ("E109", (*HANDED, START_SET)),
        ("E110", (*HELD, START_SET)),
        ("E110", (*HELD, ROUTE, START_SET)),
        ("E111", (*FETCHED, START_SET)),
        *[("E111", (*HELD, (call, True, False), START_SET)) for call in COUNTING],
        ("E112", (DONE_SET,)),
        ("E112", (START_WAIT, DONE_SET)),
        ("E112", (*REDUCED, DONE_SET)),
    ],
)
def test_an_illegal_order_has_its_code(code: str, steps: tuple[Step, ...]) -> None:
    assert refusal(*steps).code == code


@pytest.mark.parametrize(
    ("code", "steps"),
    [
        ("E101", (START_WAIT, START_WAIT)),
        ("E102", (DONE_WAIT,)),
        ("E103", (LOCAL_IDS,)),
        ("E104", (*HELD, LOCAL, LOCAL_IDS)),
        ("E105", (*HELD, (LOCAL, False, True))),
        ("E106", (*HELD, LOCAL, (LOCAL, False, True))),
        ("E107", (*HELD, GET)),
        ("E108", (*HELD, LOCAL, GATHERED)),
        ("E109", (START_SET,)),
        ("E112", (*HELD, DONE_SET)),
    ],
)
def test_static_routing_asserts_the_stage_calls_too(code: str, steps: tuple[Step, ...]) -> None:
    assert refusal(*steps, dynamic=False).code == code


@pytest.mark.parametrize("before", [(), (START_WAIT,), HELD, (*HELD, START_SET)])
def test_static_routing_routes_in_any_phase(before: tuple[Step, ...]) -> None:
    assert walk(*before, ROUTE, dynamic=False).phase is walk(*before, dynamic=False).phase


@pytest.mark.parametrize("statistics", [(), (LOCAL,), (LOCAL, GET), ((LOCAL_IDS, True, False),)])
def test_a_static_layer_is_handed_over_without_reduced_statistics(statistics: tuple[Step, ...]) -> None:
    assert walk(*HELD, *statistics, START_SET, DONE_SET, dynamic=False) == INITIAL


def test_the_calls_are_counted_until_the_layer_is_handed_over() -> None:
    state = walk(*HELD, ROUTE, (LOCAL_IDS, True, False), ROUTE, (LOCAL_IDS, False, True), START_SET)
    assert state.phase is Phase.RELEASING
    assert dict(zip(Call, state.counts, strict=True)) == dict.fromkeys(Call, 0) | {
        START_WAIT: 1, DONE_WAIT: 1, ROUTE: 2, LOCAL_IDS: 2, START_SET: 1,
    }  # fmt: skip
    assert (state.given, state.reduced) == (True, True)


def test_statistics_are_given_before_they_are_reduced() -> None:
    assert (walk(*FETCHED).given, walk(*FETCHED).reduced) == (True, False)
    assert (walk(*REDUCED).given, walk(*REDUCED).reduced) == (True, True)
    assert not walk(*HELD, (GLOBAL_IDS, True, False)).reduced


def test_any_number_of_chunks_is_counted_without_a_growing_memory() -> None:
    most = step.cache_info().maxsize or 0
    rounds = 2 * most
    state = walk(*HELD, *[ROUTE] * rounds)
    assert state.counts[ROUTE] == rounds > 0
    assert step.cache_info().currsize <= most


def test_a_step_is_cheap_enough_to_assert_every_call() -> None:
    held = walk(*HELD)
    rounds = 2000
    seconds = timeit.repeat(lambda: step(held, ROUTE, dynamic=True, first=True, last=True), number=rounds, repeat=15)
    assert min(seconds) / rounds < 1.5e-6  # the fastest round: other work on the machine only adds


def test_a_violation_tells_place_call_state_what_is_legal_and_what_to_do() -> None:
    error = violation(3, 7, refusal(*HELD, LOCAL, ROUTE, START_SET))
    assert isinstance(error, ProtocolError)
    assert (error.code, bool(error.hint)) == ("E111", True)
    assert error.what.startswith("layer 3, iteration 7: start_set_cpu_stage: ")
    assert "OWNED" in error.why
    assert "update_local_statistic 1, route 1" in error.why
    legal = error.why.rpartition("legal now: ")[2].split(", ")
    assert legal == ["get_local_statistic_tensor", "route"]


def test_a_violation_reaches_another_process_whole() -> None:
    error = violation(0, 0, refusal(DONE_WAIT))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# -- against a model that knows nothing but the calls so far ----------------------------------------------------------


def expected_code(made: list[tuple[Call, bool, bool]], call: Call, first: bool, last: bool, dynamic: bool) -> str:
    """Code of the refusal of `call` after `made`, the legal calls of this iteration; empty when it is legal."""
    names = [one for one, _, _ in made]
    counted = [one for one in made if one[0] in COUNTING]
    ended = any(is_last for _, _, is_last in counted)
    held = DONE_WAIT in names and START_SET not in names
    if call is START_WAIT:
        return "E101" if START_WAIT in names else ""
    if call is DONE_WAIT:
        return "" if names.count(START_WAIT) == 1 and DONE_WAIT not in names else "E102"
    if call is ROUTE:
        return "E103" if dynamic and not held else ""
    if call is DONE_SET:
        return "" if START_SET in names else "E112"
    if call is START_SET:
        if not held:
            return "E109"
        if not dynamic:
            return ""
        summed = GATHERED in names if LOCAL in names else ended
        return "E110" if not counted else "" if summed else "E111"
    if not held:
        return "E103"
    if any(PATHS[one] != PATHS[call] for one in names if one in PATHS):
        return "E104"
    if call is GET:
        return "" if LOCAL in names else "E107"
    if call is GATHERED:
        last_stage = next((i for i, one in enumerate(made) if one[0] is LOCAL and one[2]), len(made))
        return "" if GET in names[last_stage:] and GATHERED not in names else "E108"
    if first == bool(counted):
        return "E105"
    return "E106" if ended else ""


class AgainstHistory(RuleBasedStateMachine):
    @initialize(dynamic=st.booleans())
    def begin(self, dynamic: bool) -> None:
        self.dynamic, self.state = dynamic, INITIAL
        self.made: list[tuple[Call, bool, bool]] = []

    @rule(call=st.sampled_from(Call), first=st.booleans(), last=st.booleans())
    def call(self, call: Call, first: bool, last: bool) -> None:
        expected = expected_code(self.made, call, first, last, self.dynamic)
        if expected:
            with pytest.raises(Illegal) as caught:
                step(self.state, call, dynamic=self.dynamic, first=first, last=last)
            assert caught.value.code == expected
            return
        self.state = step(self.state, call, dynamic=self.dynamic, first=first, last=last)
        self.made = [] if call is DONE_SET else [*self.made, (call, first, last)]

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A legal call, without which a walk would rarely get far."""
        call = data.draw(st.sampled_from(legal_calls(self.state, dynamic=self.dynamic)))
        first = not any(one in COUNTING for one, _, _ in self.made)
        self.call(call, first, data.draw(st.booleans()))

    @invariant()
    def counts_and_legal_calls_agree(self) -> None:
        names = [one for one, _, _ in self.made]
        assert self.state.counts == tuple(names.count(call) for call in Call)
        flags = [(first, last) for first in (True, False) for last in (True, False)]
        assert legal_calls(self.state, dynamic=self.dynamic) == tuple(
            call for call in Call if any(not expected_code(self.made, call, *pair, self.dynamic) for pair in flags)
        )


AgainstHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstHistory = AgainstHistory.TestCase
