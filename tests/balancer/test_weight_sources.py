"""Sources of weights that move: they hold the expert, and nothing is overwritten while somebody reads it."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.balancer.cells import CellView, assign_cells
from moe_eplb.balancer.weight_sources import OWN, PEER, FromPeers, Weights, source_slots
from moe_eplb.core.placement import Placement

RANKS, EXPERTS, SLOTS = 3, 5, 4


def placement(seed: random.Random, ranks: int = RANKS, experts: int = EXPERTS, slots: int = SLOTS) -> Placement:
    held = list(range(experts)) + [seed.randrange(experts) for _ in range(ranks * slots - experts)]
    seed.shuffle(held)
    return Placement(ranks, experts, np.array(held, np.int32))


@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 4))
def test_a_source_holds_its_expert_and_is_the_rank_s_own_where_it_has_one(
    seed: random.Random, ranks: int, slots: int
) -> None:
    live = placement(seed, ranks, seed.randint(1, ranks * slots), slots)
    wanted = np.array([seed.randrange(live.experts) for _ in range(6)], np.int64)
    for rank in range(ranks):
        found = source_slots(live, wanted, rank)
        assert live.slot_to_expert[found].tolist() == wanted.tolist()
        mine = live.rank_slots(rank)
        for expert, slot in zip(wanted.tolist(), found.tolist(), strict=True):
            own = expert in live.slot_to_expert[mine]
            assert (mine.start <= slot < mine.stop) == own


def test_ranks_that_ask_for_one_expert_share_its_replicas() -> None:
    live = Placement(4, 5, np.array([0, 1, 0, 2, 3, 4, 3, 4], np.int32))
    assert [int(source_slots(live, np.array([0]), rank)[0]) for rank in (2, 3)] == [0, 2]


def test_no_experts_have_no_sources() -> None:
    live = placement(random.Random(1))
    assert FromPeers([[]] * RANKS, 0).of(CellView(live, np.zeros((RANKS, SLOTS), np.int32)), np.zeros(0, int)) == []


# -- many ranks, whose copies run as late as they like --------------------------------------------------------------


@dataclass
class Rank:
    """One rank's cells, what its copy stream has yet to do, and the iteration of the last plan that it is ready for."""

    cells: list[Weights]
    queue: deque[tuple[torch.Tensor, torch.Tensor, int] | int] = field(default_factory=deque)
    ready: int = -1

    def step(self) -> None:
        """Do the next thing of the stream: a copy, whose source must hold the expert just now, or the ready word."""
        work = self.queue.popleft()
        if isinstance(work, int):
            self.ready = work
            return
        target, source, expert = work
        assert int(source) == expert, "the source was overwritten before it was read"
        target.copy_(source)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_source_is_overwritten_before_it_is_read_whatever_is_late_or_dropped(seed: random.Random) -> None:
    spare = seed.randint(1, SLOTS)
    live = CellView(placement(seed), np.tile(np.arange(SLOTS, dtype=np.int32), (RANKS, 1)))
    ranks = [Rank([{"w": torch.tensor(-1)} for _ in range(SLOTS + spare)]) for _ in range(RANKS)]
    for slot, expert in enumerate(live.placement.slot_to_expert.tolist()):
        ranks[slot // SLOTS].cells[slot % SLOTS]["w"].fill_(expert)
    commits = 0
    for due in range(12):
        proposed = proposal(seed, live, spare, due)
        for number in seed.sample(range(RANKS), RANKS):  # each rank stages when it comes to it
            stage(ranks, number, live, proposed)
            run_some(ranks, seed)
        for _ in range(seed.randint(0, 8)):
            run_some(ranks, seed)
        if all(rank.ready == due for rank in ranks):  # the vote; without all of them the plan is dropped
            live, commits = proposed, commits + 1
        for slot, expert in enumerate(live.placement.slot_to_expert.tolist()):
            cell = int(live.cells[slot // SLOTS, slot % SLOTS])
            assert int(ranks[slot // SLOTS].cells[cell]["w"]) == expert, "what is live was overwritten"
    assert commits <= 12


def proposal(seed: random.Random, live: CellView, spare: int, due: int) -> CellView:
    """Another placement that differs in at most `spare` slots of a rank."""
    slots = live.placement.slot_to_expert.copy()
    for rank in range(RANKS):
        for slot in seed.sample(range(SLOTS), seed.randint(0, spare)):
            number = rank * SLOTS + slot
            if (slots == slots[number]).sum() > 1:
                slots[number] = seed.randrange(EXPERTS)
    made = Placement(RANKS, EXPERTS, slots)
    changed = made.changed_slots(live.placement)
    return CellView(made, assign_cells(live.cells, changed, SLOTS + spare, layer=0, first_rank=0), due)


def stage(ranks: list[Rank], number: int, live: CellView, proposed: CellView) -> None:
    """What one rank's updater enqueues for a plan."""
    mine = proposed.placement.rank_slots(number)
    changed = [slot for slot in proposed.placement.changed_slots(live.placement) if mine.start <= slot < mine.stop]
    experts = proposed.placement.slot_to_expert[changed]
    found = FromPeers([rank.cells for rank in ranks], number).of(live, experts)
    for slot, expert, (kind, weights) in zip(changed, experts.tolist(), found, strict=True):
        held_here = expert in live.placement.slot_to_expert[mine]
        assert kind == (OWN if held_here else PEER)
        target = ranks[number].cells[int(proposed.cells[number, slot - mine.start])]
        ranks[number].queue.append((target["w"], weights["w"], expert))
    ranks[number].queue.append(proposed.due)


def run_some(ranks: list[Rank], seed: random.Random) -> None:
    for rank in ranks:
        for _ in range(seed.randint(0, 3)):
            if rank.queue:
                rank.step()
