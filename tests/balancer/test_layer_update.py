"""Updates of layers: when they are taken, when they are committed, and that nothing else changes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from moe_eplb.core.schedule import update_groups
from tests.support.balanced import Rig, StandIn
from tests.support.ranks import run_ranks

# (E, K, rank, R, slots per rank, L, layer_updates_per_iter, warm-up): the sizes of TensorRT-LLM's multi-layer test
CASES = [(8, 2, 0, 2, 4, 2, 1, 2), (16, 1, 0, 4, 4, 3, 2, 1), (32, 4, 1, 8, 4, 5, 3, 0), (256, 8, 4, 36, 8, 61, 10, 5)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_scheduled_layers_change_and_they_do_change(case: tuple[int, ...]) -> None:
    experts, top_k, rank, ranks, per_rank, layers, updates, warm_up = case
    tokens = 24 if ranks < 36 else 3
    rig = Rig(
        layers, experts, top_k, updates=updates, slots_per_rank=per_rank, rank=rank, ranks=ranks, tokens=tokens
    )  # fmt: skip
    rig.balancer.set_warm_up_iter_count(warm_up)
    groups = update_groups(layers, updates)
    ever_changed: set[int] = set()
    try:
        for iteration in range(warm_up + len(groups) + 2):
            before = [storage.clone() for storage in rig.storage]
            rig.iterate()
            turn = iteration - 1 - warm_up
            scheduled = groups[turn % len(groups)] if turn >= 0 else ()
            committed = sorted(layer for layer, _, when in rig.journal.commits if when == iteration)
            assert committed == sorted(scheduled)
            changed = {i for i in range(layers) if not torch.equal(before[i], rig.storage[i])}
            assert changed <= set(scheduled)
            ever_changed |= changed
            assert all(layer.statistic_flag_tensor.item() == 1 for layer in rig.layers)
            rig.assert_weights_match()
        assert ever_changed == set(range(layers))
        assert rig.journal.drops == []
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_commit_comes_exactly_the_delay_after_the_hand_over(delay: int, seed: int | None) -> None:
    rig = Rig(3, updates=3, commit_delay=delay, empty_group="never", seed=seed)
    rig.iterate(8)
    rig.balancer.shutdown()
    assert rig.journal.drops == []
    # One update at a time: the next one is taken in the iteration of the commit.
    taken = range(0, 8 - delay, delay)
    assert rig.journal.commits == [(layer, at, at + delay) for at in taken for layer in range(3)]


def test_a_layer_with_a_pending_update_takes_no_other() -> None:
    rig = Rig(2, updates=2, commit_delay=3, empty_group="never")
    rig.iterate()
    first = rig.layers[0].updates.pending
    assert first is not None
    rig.iterate(2)
    assert rig.layers[0].updates.pending is first
    assert not rig.balancer.takes_update(0)
    rig.balancer.shutdown()


def test_one_layer_commits_with_a_delay_of_two() -> None:
    rig = Rig(1, commit_delay=2, empty_group="never")
    rig.iterate(7)
    rig.balancer.shutdown()
    assert [(taken, when) for _, taken, when in rig.journal.commits] == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_reordering_gives_the_same_bits(ranks: int) -> None:
    def run(seed: int | None) -> tuple[object, ...]:
        rig = Rig(3, updates=2, ranks=ranks, seed=seed)
        chosen = [rig.iterate() for _ in range(7)]
        rig.balancer.shutdown()
        storage = [storage.tolist() for storage in rig.storage]
        return chosen, storage, rig.journal.commits, rig.journal.placements, rig.journal.loads

    expected = run(None)
    assert len(expected[2]) > 5  # type: ignore[arg-type]
    for seed in range(12):
        assert run(seed) == expected


class Dissent(StandIn):
    """The others' votes are `rank_votes` times this rank's, plus `shift` in the lanes."""

    def __init__(self, ranks: int, others: Tensor, shift: list[int]) -> None:
        super().__init__(ranks, others)
        self._shift = torch.tensor(shift)

    def __call__(self, tensor: Tensor) -> None:
        lanes = tensor[len(self._others) :].clone()
        super().__call__(tensor)
        if lanes[0]:
            tensor[len(self._others) :] += self._shift


@pytest.mark.parametrize(
    ("shift", "text"), [([0, 1, 0, 0, 0], "digests differ"), ([-1, 0, 0, 0, 0], "ready on 1 of 2 ranks")]
)
def test_votes_that_differ_drop_the_plan_and_the_old_placement_stays(
    shift: list[int], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(2, updates=2, ranks=2, empty_group="never")
    before, weights = rig.placements(), [storage.clone() for storage in rig.storage]
    with caplog.at_level(logging.ERROR):
        rig.iterate(4, Dissent(2, torch.zeros(6, dtype=torch.int64), shift))
    assert rig.journal.commits == []
    assert len(rig.journal.drops) >= 6
    assert text in caplog.text
    assert rig.placements() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, rig.storage, strict=True))
    rig.iterate(4)
    rig.balancer.shutdown()
    assert rig.journal.commits
    rig.assert_weights_match()


def test_a_vote_that_nobody_carried_drops_the_plan_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Path A without the agreement lanes: a plan that the ranks never voted on must not be committed."""
    rig = Rig(2, updates=2, ranks=2, empty_group="never")
    for _ in range(3):
        rig.balancer.start_iter()
        for layer in rig.layers:
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            layer.update_local_statistic(rig.ids(layer.layer_idx, 0), True, True)
            counts = layer.get_local_statistic_tensor()
            assert counts is not None
            layer.update_statistic_with_gathered_statistic(torch.stack([counts, counts]))
            layer.start_set_cpu_stage()
            layer.done_set_cpu_stage()
        rig.balancer.end_iter()
    rig.balancer.shutdown()
    assert rig.journal.commits == []
    assert "not agreed on before iteration 1" in caplog.text


def test_no_placement_moves_during_warm_up_and_tokens_are_counted() -> None:
    rig = Rig(2, updates=2, empty_group="never")
    rig.balancer.set_warm_up_iter_count(3)
    rig.iterate(3)
    assert rig.journal.commits == []
    assert len(rig.journal.loads) == 6
    rig.iterate(2)
    rig.balancer.shutdown()
    assert {(taken, when) for _, taken, when in rig.journal.commits} == {(3, 4)}


def _on_real_ranks(rank: int, size: int, seed: int) -> tuple[list[tuple[int, list[int]]], list[tuple[int, int, int]]]:
    import torch.distributed as dist

    from moe_eplb.balancer import AllReduce

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    assert isinstance(statistics, dist.ProcessGroup)
    rig = Rig(3, updates=2, rank=rank, ranks=size, group=setup, seed=seed)
    rig.iterate(8, AllReduce(statistics))
    rig.assert_weights_match()
    rig.balancer.shutdown()
    return rig.journal.placements, rig.journal.commits


def test_real_ranks_commit_the_same_placements_and_as_one_process_does() -> None:
    alone = Rig(3, updates=2, ranks=2)
    alone.iterate(8)
    alone.balancer.shutdown()
    first, second = run_ranks(_on_real_ranks, 2, 5)
    assert first == second == (alone.journal.placements, alone.journal.commits)
