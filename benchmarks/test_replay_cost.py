"""What a replayed iteration costs the host beside the launch: the end of one and the begin of the next.

All layers' state lives on the device, several hand over in each iteration, and their plans are awaited, noted and
committed. What a graph would do is done in between, outside of the clock.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from moe_eplb.balancer import MoeLoadBalancerIterContext
from tests.support.balanced import Rig

DELAY, ROUNDS = 4, 300
TARGET_US = 15.0
"""Of a layer."""


class Replays:
    """Iterations of a balancer whose device would work later; `between` is what is timed."""

    def __init__(self, layers: int, updates: int) -> None:
        self.rig = Rig(layers, updates=updates, commit_delay=DELAY, empty_group="never", resident=True)
        self.rig.balancer.device.immediate = False
        self._open = ExitStack()
        self._begin()

    def between(self) -> None:
        """End the iteration under way and begin another one."""
        self._open.close()
        self._begin()

    def _begin(self) -> None:
        balancer = self.rig.balancer
        self._open.enter_context(MoeLoadBalancerIterContext(balancer))
        self._open.enter_context(balancer.replaying())

    def close(self) -> None:
        """End the last iteration and the balancer."""
        self.rig.replay()
        self._open.close()
        self.rig.balancer.shutdown()


@pytest.mark.parametrize(("layers", "updates"), [(16, 4), (61, 4)])
def test_host_between_replays(benchmark: BenchmarkFixture, layers: int, updates: int) -> None:
    with torch.inference_mode():
        replays = Replays(layers, updates)
        try:
            benchmark.pedantic(  # type: ignore[no-untyped-call]
                replays.between, setup=replays.rig.replay, rounds=ROUNDS, warmup_rounds=20
            )
        finally:
            replays.close()
    stats = benchmark.stats
    assert stats is not None
    median, fastest = (seconds * 1e6 / layers for seconds in (stats.stats.median, stats.stats.min))
    commits = len(replays.rig.journal.commits)
    benchmark.extra_info |= {
        "us_per_layer": round(median, 2),
        "fastest_round_us": round(fastest, 2),
        "commits": commits,
    }
    assert commits > ROUNDS, "plans are noted meanwhile"
    assert fastest <= TARGET_US
