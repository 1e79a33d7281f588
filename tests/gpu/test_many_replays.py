"""On two GPUs replays that nobody waits for lose no plan, however full the queue of launches gets."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.layer_cases import Case
from benchmarks.gpu.ranks import Ranks
from benchmarks.gpu.stacks import ForcedOptions, build
from moe_eplb.core.events import NullSink
from moe_eplb.session.groups import GroupsBySize
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"), pytest.mark.timeout(200)
]  # fmt: skip

CASE = Case("a few experts", 256, 16, 512, 256, 4)
LAYERS, REPLAYS, DELAY = 8, 400, 2


def _replays(rank: int, size: int) -> tuple[int, int, float]:
    """Commits, plans dropped, and the longest that the device waited for one, in s."""
    from moe_eplb.device.cuda import CudaDevice

    torch.cuda.set_device(rank)
    ranks = Ranks(rank, size, GroupsBySize(60.0).of(size, "nccl"))
    options = ForcedOptions(
        resident=True, spare_slots=4, forced=4, empty_group="never", weights_from="peer", commit_delay=DELAY
    )
    with torch.inference_mode():
        stack = build(
            CASE, LAYERS, CudaDevice(NullSink(), index=rank), updates=LAYERS // DELAY, slots=CASE.experts,
            options=options, ranks=ranks,
        )  # fmt: skip
        try:
            stack.capture()
            stack.updating(True)
            for _ in range(REPLAYS):
                stack.replay()
            stack.settle()
        finally:
            ranks.barrier()
            stack.balancer.shutdown()
    return stack.moves.commits, stack.moves.drops, max(stack.moves.stalls, default=0.0)


def test_no_plan_is_late_for_want_of_the_drivers_lock() -> None:
    for commits, drops, longest in run_ranks(_replays, 2, timeout=150):
        assert drops == 0
        assert commits >= (REPLAYS // DELAY - 2) * LAYERS
        assert longest < 0.1
