"""When ranks say that they exchange rows, and when no longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.moe.dispatch import collectives
from tests.moe.test_wide_ep import _layer, _step
from tests.support.ranks import run_ranks

WAYS = [(d, s) for d in ("alltoall", "allgather", "symm_mem") for s in (False, True)]


def _told(rank: int, size: int, dispatch: str, static: bool, tokens: list[int]) -> list[tuple[str, int]]:
    """What the link said in collectives of rows and in the experts, and when a forward was over."""
    device = get_device("cpu", NullSink(), rank=rank)
    device.link = link = torch.zeros(1, dtype=torch.int32)
    moe = _layer(device, dispatch=dispatch, static=static, ep_group=dist.group.WORLD)
    seen: list[tuple[str, int]] = []

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            seen.append((name, int(link)))
            return call(*given, **named)

        setattr(owner, name, watched)

    for name in ("_all_gather", "_reduce_scatter"):
        watch(collectives, name)
    watch(dist, "all_to_all_single")
    if dispatch == "symm_mem":
        watch(moe._dispatcher.symmetric, "exchange")
    watch(moe.experts, "grouped_ffn")
    _step(moe, rank, tokens[rank], 0, tokens if static else None)
    return [*seen, ("over", int(link))]


@pytest.mark.parametrize(("dispatch", "static"), WAYS)
@pytest.mark.parametrize("tokens", [[4, 4], [3, 0]])
def test_rows_travel_while_the_link_is_said_to_be_busy(dispatch: str, static: bool, tokens: list[int]) -> None:
    for rank, told in enumerate(run_ranks(_told, 2, dispatch, static, tokens)):
        at = next(i for i, (name, _) in enumerate(told) if name == "grouped_ffn")
        assert told[at][1] == 0
        assert told[-1] == ("over", 0)
        # What comes before rows tells their numbers alone; a rank without rows of its own may have nothing to say.
        dispatched, combined = told[at - 1], told[at + 1]
        if tokens[rank] or static or dispatch != "alltoall":
            assert dispatched[1] == 1, told
        if static or dispatch != "alltoall":
            assert combined[1] == 1, told


def _chunked(rank: int, size: int) -> int:
    device = get_device("cpu", NullSink(), rank=rank)
    device.link = link = torch.ones(1, dtype=torch.int32)
    moe = _layer(device, dispatch="allgather", ep_group=dist.group.WORLD, moe_max_num_tokens=4)
    _step(moe, rank, 7, 0, [7, 7])
    return int(link)


def test_after_chunks_the_link_is_free() -> None:
    assert run_ranks(_chunked, 2) == [0, 0]


def test_a_single_rank_says_nothing() -> None:
    device = get_device("cpu", NullSink())
    device.link = link = torch.full((1,), 7, dtype=torch.int32)
    _step(_layer(device, dispatch="allgather"), 0, 4, 0, [4])
    assert int(link) == 7
