"""What a step costs with a balancer that moves experts, against one whose placement never changes.

Two ranks hold the same model three times over and run the three in turns, so that what else the machine does falls on
all alike. Times are rank 0's, from a barrier to the end of the step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture

from moe_eplb.balancer import MoeLoadBalancerIterContext
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import get_device
from moe_eplb.recording.event_log import EventLog
from moe_eplb.session.balancing import make_balancer
from moe_eplb.session.groups import Groups, GroupsBySize
from moe_eplb.session.stack import MoeStack
from tests.support.ranks import run_ranks

RANKS, LAYERS, STEPS, WARM_UP = 2, 4, 60, 5
UPDATES = {"static": 0, "one layer an iteration": 1, "every layer an iteration": LAYERS}
SCENARIO = """\
ranks: {ranks}
iterations: {steps}
model: {{layers: {layers}, experts: 32, top_k: 4, hidden: 256, intermediate: 128}}
workload: {{kind: model, tokens_per_rank: 256}}
balancer: {{num_slots: 40, layer_updates_per_iter: {updates}, empty_group: never, update_timeout_s: 20}}
"""


class _Model:
    """One rank's part of a model with its own balancer and event log."""

    def __init__(self, updates: int, rank: int, groups: Groups, log: EventLog) -> None:
        text = SCENARIO.format(ranks=RANKS, steps=STEPS, layers=LAYERS, updates=updates)
        scenario: Scenario = scenarios.loads(text, "step.yaml")
        device = get_device(scenario.device, log, seed=scenario.effective_reorder_seed, rank=rank)
        self.balancer = make_balancer(scenario, rank, device, groups)
        assert self.balancer is not None
        with self.balancer:
            self._stack = MoeStack(scenario, rank, device, groups)
        self.balancer.finalize_model()
        self.balancer.set_iter_info(enable_statistic=True, enable_update_weights=updates > 0)

    def step(self, iteration: int) -> float:
        """Seconds that a step takes."""
        dist.barrier()
        started = time.perf_counter()
        with MoeLoadBalancerIterContext(self.balancer):
            self._stack.step(iteration)
        return time.perf_counter() - started


def _times(rank: int, size: int, folder: str) -> tuple[dict[str, list[float]], int]:
    """Seconds of each step of each model, and how many slots changed in all."""
    torch.set_num_threads(1)
    groups = GroupsBySize().of(size)
    with contextlib.ExitStack() as stack, torch.inference_mode():
        models = {}
        for name, updates in UPDATES.items():
            log = stack.enter_context(EventLog(Path(folder) / f"{name}.{rank}.bin", rank))
            models[name] = _Model(updates, rank, groups, log)
            balancer = models[name].balancer
            assert balancer is not None
            stack.callback(balancer.shutdown)
        times: dict[str, list[float]] = {name: [] for name in models}
        for iteration in range(WARM_UP + STEPS):
            for name, model in models.items():
                times[name].append(model.step(iteration))
        last = models["every layer an iteration"].balancer
        assert last is not None
        commits = sum(layer.updates.version for layer in last.layers)
    return {name: taken[WARM_UP:] for name, taken in times.items()}, commits


def test_step(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    results = benchmark.pedantic(  # type: ignore[no-untyped-call]
        run_ranks, args=(_times, RANKS, str(tmp_path)), rounds=1
    )
    times, commits = results[0]
    assert commits == LAYERS * (WARM_UP + STEPS - 1)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    benchmark.extra_info |= {
        "median_ms": {name: round(median * 1e3, 3) for name, median in medians.items()},
        "against_static": {name: round(median / medians["static"], 3) for name, median in medians.items()},
        "ms": {name: [round(seconds * 1e3, 3) for seconds in taken] for name, taken in times.items()},
    }
