"""Two ranks of which one plans something else: neither may commit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import AllReduce
from moe_eplb.balancer import agreement as agreement_module
from moe_eplb.balancer.agreement import Outcome
from moe_eplb.balancer.layer_update import LayerUpdate
from tests.support.balanced import Rig
from tests.support.faults.base import Fault, demand, log_lines

__all__ = ["FAULTS"]

RANKS = 2


class Together(AllReduce):
    """The sum over ranks that are threads of one process; like a collective, all must take part."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=20)
        self._given: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> None:
        self._given.append(tensor.clone())
        self._barrier.wait()
        tensor.copy_(torch.stack(self._given).sum(0))
        if self._barrier.wait() == 0:
            self._given.clear()
        self._barrier.wait()


def on_both(ranks: list[Rig], work: Callable[[Rig], object]) -> None:
    raised: list[BaseException] = []

    def run(rig: Rig) -> None:
        try:
            work(rig)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(rig,)) for rig in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if raised:
        raise raised[0]


def diverge(rig: Rig) -> list[Callable[[], object]]:
    """Make this rank plan for the expert that has the least to do, and return how to end that."""
    windows = [layer._statistics.load for layer in rig.layers]

    def least_alone(take: Callable[[], np.ndarray]) -> np.ndarray:
        load = take()
        return np.where(np.arange(len(load)) == load.argmin(), 1.0, 0.0)

    for window in windows:
        window.take = partial(least_alone, window.take)  # type: ignore[method-assign]
    return [partial(window.__dict__.pop, "take") for window in windows]


def check_diverged_plans() -> None:
    """Both ranks drop what they do not agree on, say so, and commit again when they agree."""
    ranks = [Rig(2, updates=2, empty_group="never", rank=rank, ranks=RANKS) for rank in range(RANKS)]
    together = Together()
    before = ranks[0].placements()
    ends = diverge(ranks[1])
    try:
        with log_lines() as lines:
            on_both(ranks, lambda rig: rig.iterate(4, together))
        demand(ranks[0].placements() == ranks[1].placements(), "the ranks hold different placements")
        demand(ranks[0].placements() == before, "a plan that one rank alone had made was committed")
        demand(ranks[0].journal.drops == ranks[1].journal.drops != [], "the ranks do not drop alike")
        demand(any("digests differ" in line for line in lines), "nobody says that the plans differ")
        for end in ends:
            end()
        on_both(ranks, lambda rig: rig.iterate(4, together))
        for rig in ranks:
            rig.assert_weights_match()
    finally:
        for rig in ranks:
            rig.balancer.shutdown()
    demand(ranks[0].journal.commits == ranks[1].journal.commits != [], "the ranks do not commit again")
    demand(ranks[0].placements() == ranks[1].placements(), "the ranks hold different placements")


def no_checksum(patch: pytest.MonkeyPatch) -> None:
    """The ranks only tell that they are ready."""

    def ready_alone(summed: Tensor) -> Outcome:
        return Outcome(int(summed[0]), False)

    patch.setattr(agreement_module, "outcome", ready_alone)


def no_vote(patch: pytest.MonkeyPatch) -> None:
    """Every rank trusts that the others have computed what it has."""

    def settle(self: LayerUpdate, result: Outcome) -> None:
        if self.pending is not None:
            self.pending.agreed = True

    patch.setattr(LayerUpdate, "settle", settle)


FAULTS = [
    Fault(
        "ranks compute placements with no checksum across ranks", check_diverged_plans, no_checksum,
        "the ranks hold different placements",
    ),
    Fault(
        "ranks commit without asking each other", check_diverged_plans, no_vote, "the ranks hold different placements",
    ),
]  # fmt: skip
