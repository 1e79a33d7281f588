"""Weights that come from other ranks' cells: the same results as from the host, on real ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.core.probe import NullProbe, Probes
from moe_eplb.device import get_device
from tests.support.balanced import Rig
from tests.support.ranks import RankError, run_ranks


class Sources(NullProbe):
    """Adds up where bytes came from."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def copied(self, layer: int, by_source: Mapping[str, int]) -> None:
        for source, size in by_source.items():
            self.bytes[source] = self.bytes.get(source, 0) + size


def moved(rank: int, size: int, options: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """What 12 iterations chose, committed and placed, and where the weights came from."""
    import torch.distributed as dist

    from moe_eplb.balancer import AllReduce

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    rig = Rig(3, 8, updates=2, rank=rank, ranks=size, group=setup, slots_per_rank=5, seed=3, resident=True, **options)
    sources = Sources()
    rig.balancer.probe = Probes(rig.journal, sources)
    chosen = []
    for _ in range(12):
        chosen.append(rig.iterate(allreduce=AllReduce(statistics)))
        rig.assert_weights_match()
    rig.balancer.shutdown()
    return [chosen, rig.journal.commits, rig.journal.placements], sources.bytes


@pytest.mark.parametrize("options", [{}, {"spare_slots": 1}, {"commit_delay": 2}], ids=["all", "few", "late"])
def test_peers_give_what_the_host_gives(options: dict[str, Any]) -> None:
    by_host = run_ranks(moved, 2, options)
    by_peers = run_ranks(moved, 2, {**options, "weights_from": "peer"})
    assert [result for result, _ in by_peers] == [result for result, _ in by_host]
    for (_, host), (_, peers) in zip(by_host, by_peers, strict=True):
        assert set(host) == {"host"}
        assert set(peers) <= {"own", "peer"}
        assert peers["peer"] > 0
        assert sum(peers.values()) == sum(host.values())


def test_one_rank_copies_from_itself_and_keeps_no_copies_on_the_host() -> None:
    rig = Rig(2, 6, updates=2, slots_per_rank=9, resident=True, weights_from="peer")
    try:
        for layer in rig.layers:
            assert not layer.need_load_shared_weights()
            assert list(layer.load_expert_ids) == []
            assert layer.updates.host.memory() == []
            with pytest.raises(BalancerError, match="no host copies are needed") as info:
                layer.share_expert_weight(0, "w", torch.zeros(1))
            assert info.value.code == "E164"
        rig.iterate(6)
        rig.assert_weights_match()
        assert rig.journal.commits
    finally:
        rig.balancer.shutdown()


def test_slots_with_different_weights_are_refused_without_a_host_copy_too() -> None:
    balancer = MoeLoadBalancer(
        0, 1, 1, device=get_device("cpu", NullSink()), options=BalancerOptions(
            resident=True, weights_from="peer", commit_delay=2
        )
    )  # fmt: skip
    layer = balancer.add_layer(2, 1, 2)
    cells = [{"w": torch.zeros(4)} for _ in range(2 + layer.spare_slots)]
    layer.register_weight_cells(torch.arange(2, dtype=torch.int32), cells)
    layer.register_weight_slot(0, "w", cells[0]["w"])
    layer.register_weight_slot(1, "w", cells[1]["w"][:3])
    with pytest.raises(BalancerError, match=r"local slot 1 and local slot 0 have different weights") as info:
        balancer.finalize_model()
    assert info.value.code == "E137"


def _with_other_cells(rank: int, size: int) -> None:
    import torch.distributed as dist

    group = dist.new_group(list(range(size)))
    Rig(
        2, 8, updates=2, rank=rank, ranks=size, group=group, slots_per_rank=5, resident=True, weights_from="peer",
        spare_slots=1 + rank,
    )  # fmt: skip


def test_ranks_with_other_cells_are_refused() -> None:
    with pytest.raises(RankError, match=r"layer 0: ranks [01] and [01] have different cells"):
        run_ranks(_with_other_cells, 2)


def test_a_state_on_the_host_cannot_have_peers() -> None:
    with pytest.raises(BalancerError, match="overwritten in place") as info:
        BalancerOptions(weights_from="peer")
    assert info.value.code == "E207"
