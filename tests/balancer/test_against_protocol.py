"""The running balancer accepts exactly what the protocol's table accepts, call by call, and fails with its codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, SingleLayerMoeLoadBalancer
from moe_eplb.core.errors import ProtocolError
from moe_eplb.core.events import NullSink
from moe_eplb.core.protocol import INITIAL, Call, Illegal, IterState, LayerState, iter_step, step
from moe_eplb.device import CpuDevice

EXPERTS, SLOTS, LAYERS = 4, 6, 2
IDS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


@contextlib.contextmanager
def running_balancer(updates: int) -> Iterator[MoeLoadBalancer]:
    """One rank, two layers, ready to iterate."""
    balancer = MoeLoadBalancer(
        0, 1, updates, device=CpuDevice(NullSink(), seed=5), options=BalancerOptions(empty_group="never")
    )
    for _ in range(LAYERS):
        layer = balancer.add_layer(EXPERTS, 2, SLOTS)
        for expert in layer.load_expert_ids if updates else ():
            layer.share_expert_weight(expert, "w", torch.full((2,), float(expert)))
        for slot, expert in enumerate(layer.local_slot_experts() if updates else ()):
            layer.register_weight_slot(slot, "w", torch.full((2,), float(expert)))
    balancer.finalize_model()
    balancer.set_iter_info(enable_statistic=True, enable_update_weights=updates > 0)
    try:
        yield balancer
    finally:
        balancer.device.discard()
        balancer.shutdown()


class Model:
    """What the table says."""

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.iteration = IterState(next_iteration=0, in_iter=False)
        self.layers: list[LayerState] = [INITIAL] * LAYERS

    def iterate(self, name: str) -> str:
        """The code of the error that start_iter, end_iter or abort_iter must raise, or ""."""
        unfinished = tuple(i for i, state in enumerate(self.layers) if state is not INITIAL)
        layers = LAYERS if self.dynamic else 0
        try:
            self.iteration = iter_step(self.iteration, name, layers=layers, unfinished=unfinished)  # type: ignore[arg-type]
        except Illegal as error:
            return error.code
        if name == "abort_iter":
            self.layers = [INITIAL] * LAYERS
        return ""

    def call(self, layer: int, call: Call, first: bool, last: bool) -> str:
        """The same for a layer's call."""
        try:
            begun = self.iteration
            if call is Call.START_WAIT_GPU_STAGE and self.dynamic:
                begun = iter_step(self.iteration, "layer", layers=LAYERS, layer=layer)
            self.layers[layer] = step(self.layers[layer], call, dynamic=self.dynamic, first=first, last=last)
            self.iteration = begun
        except Illegal as error:
            return error.code
        return ""


def code_of(act: Callable[[], object]) -> str:
    """The code of the protocol error that `act` raises, or ""."""
    try:
        act()
    except ProtocolError as error:
        return error.code
    return ""


def make_call(layer: SingleLayerMoeLoadBalancer, call: Call, first: bool, last: bool) -> None:
    """Make a call with plain arguments."""
    method = getattr(layer, call.name.lower())
    match call:
        case Call.UPDATE_LOCAL_STATISTIC | Call.UPDATE_STATISTIC_WITH_LOCAL_IDS | Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS:
            method(IDS, first, last)
        case Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC:
            method(torch.ones(1, EXPERTS, dtype=torch.int32))
        case Call.ROUTE:
            method(IDS)
        case _:
            method()


ITERATION = st.sampled_from(["start_iter", "end_iter", "abort_iter"])
# Mostly calls that follow the order, so that long legal prefixes are reached, with any others in between.
USUAL = [
    [
        Call.START_WAIT_GPU_STAGE,
        Call.DONE_WAIT_GPU_STAGE,
        path,
        Call.ROUTE,
        Call.START_SET_CPU_STAGE,
        Call.DONE_SET_CPU_STAGE,
    ]
    for path in (Call.UPDATE_STATISTIC_WITH_LOCAL_IDS, Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS)
]
ANY = st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(Call), st.booleans(), st.booleans()).map(lambda t: [t])
LEGAL = st.tuples(st.integers(0, LAYERS - 1), st.sampled_from(USUAL), st.integers(1, 6)).map(
    lambda t: [(t[0], call, True, True) for call in t[1][: t[2]]]
)
STEPS = st.lists(st.one_of(ITERATION.map(lambda name: [name]), LEGAL, ANY), max_size=25)


@pytest.mark.parametrize("dynamic", [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blocks=STEPS)
def test_every_call_ends_as_the_table_says(dynamic: bool, blocks: list[list[object]]) -> None:
    model = Model(dynamic=dynamic)
    with running_balancer(updates=LAYERS if dynamic else 0) as balancer:
        for item in (item for block in [["start_iter"], *blocks] for item in block):
            if isinstance(item, str):
                assert code_of(getattr(balancer, item)) == model.iterate(item), item
            else:
                index, call, first, last = item  # type: ignore[misc]
                real = code_of(lambda: make_call(balancer.layers[index], call, first, last))  # noqa: B023
                assert real == model.call(index, call, first, last), (index, call)
