"""Hand-over from the GPU to a thread and back, replays without end, and what the thread that launches pays.

    python -m benchmarks.gpu.hand_over --out FILE.json

Exit 2 where there is no GPU, 1 where outputs differ or an answer stays away.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np
import torch
from tabulate import tabulate

from benchmarks.gpu.layer_cases import Case
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.stacks import ForcedOptions, Stack, build
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.balancer.updater import Update
from moe_eplb.core.events import NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan, initial_slots
from moe_eplb.core.samples import compare
from moe_eplb.device import control
from moe_eplb.device.control import LayerState, ModelState, Report
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.device.watching_bell import WatchingBell
from moe_eplb.planning.online import Planning

__all__ = ["main"]

_ENDLESS = ("bounded", "unbounded")
PARTS = ("hand_over", "hand_over_awake", "launch_rate", *_ENDLESS)
_SMALL = Case("small", 64, 16, 256, 128, 2)
_LAYERS, _FORCED = 2, 2
_BOUND_S = 1.0
_DELAY = 2


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=100), default=100_000, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Only these parts.")
def main(out: Path, replays: int, only: Sequence[str]) -> None:
    """Time hand-overs, and replay without a synchronisation."""
    require_gpus()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "hand_over": partial(hand_over, sleeps=True), "hand_over_awake": partial(hand_over, sleeps=False),
        "launch_rate": launch_rate, "bounded": partial(endless, replays, run_ahead=4),
        "unbounded": partial(endless, max(100, replays // 20), run_ahead=8192, limited=False),
    }  # fmt: skip
    result: dict[str, Any] = machine("benchmarks.gpu.hand_over")
    for name in only or PARTS:
        with torch.inference_mode():
            result[name] = parts[name]()
        click.echo(f"{name} is done", err=True)
        write(out, result)
    _print(result)
    if any(result[name]["differs"] for name in _ENDLESS if name in result):
        click.echo("the outputs of layers whose experts moved differ from those of static ones", err=True)
        raise SystemExit(1)


def hand_over(*, sleeps: bool, count: int = 400) -> dict[str, Any]:
    """Microseconds from the GPU's signal over a thread that waits in the driver to the GPU that sees the answer.

    The GPU measures: in a graph that rings and then votes, the vote waits for what the thread publishes by a copy, and
    notes how long.
    """
    device = CudaDevice(NullSink())
    place, host = device.torch_device, device.host_visible
    model = ModelState.make(2, place, host, 4)
    tables = [torch.zeros(200, dtype=torch.int32, device=place) for _ in range(2)]
    cells = [torch.zeros(72, dtype=torch.int32, device=place) for _ in range(2)]
    layers = [LayerState.make(index, 64, tables[index], cells[index], 1, host) for index in range(2)]
    bell, found, word = device.new_bell(model.bell, awake=not sleeps), list[float](), model.ready[1:2]
    copier = device.new_copier()
    asked = threading.Semaphore(0)

    def answer() -> None:
        device.enter_thread()
        for ring in range(1, count + 1):
            if not asked.acquire(timeout=10) or not bell.wait(ring, 5.0):
                return
            copier.wait()
            copier.enqueue([], [(word, ring)])

    def ring_and_wait() -> None:
        control.hand_over(model, layers[0], delay=1)
        control.vote(model, layers[0], layers[1], timeout_ns=2_000_000_000, wait=None)

    main = torch.cuda.current_stream()
    ring_and_wait()  # to load a kernel may wait for all streams, one of which will wait for the bell
    main.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        ring_and_wait()
    model.rung.zero_()
    model.bell.zero_()
    thread = threading.Thread(target=answer)
    thread.start()
    for ring in range(1, count + 1):
        model.turn.copy_(torch.tensor([ring, 0, 1, 0]))
        model.due.copy_(torch.tensor([-1, ring]))
        model.decision.fill_(-1)
        main.synchronize()
        asked.release()
        time.sleep(0.0005)  # the thread waits by now
        graph.replay()
        main.synchronize()
        found.append(int(model.report(1, ring)[Report.WAITED_NS]) / 1e3)
    thread.join(timeout=10)
    found = found[20:]
    return {"median_us": median(found), "p99_us": quantiles(found, n=100)[98], "asked_us": 30.0, "samples_us": found}


def launch_rate(rounds: int = 40, launches: int = 6000) -> dict[str, Any]:
    """Microseconds of an eager launch: no updater at work, one that rests after each update, one that never rests.

    Launches of a quiet thread differ by a quarter from one second to the next, so that blocks are short, and each is
    compared with the quiet one of its own round.
    """
    device = CudaDevice(NullSink())
    options = ForcedOptions(resident=True, spare_slots=_FORCED, forced=_FORCED)
    stack = build(_SMALL, _LAYERS, device, updates=_LAYERS, slots=20, options=options)
    busy = Busy(stack)
    pauses = {"quiet": None, "every_20_ms": 0.02, "every_5_ms": 0.005, "without_pause": 0.0}
    x = torch.zeros(64, device=device.torch_device)
    samples: dict[str, list[float]] = {name: [] for name in pauses}
    updates = dict.fromkeys(pauses, 0)
    try:
        for turn in range(rounds):
            for name in pauses if turn % 2 == 0 else reversed(pauses):
                before = busy.done
                busy.switch(pauses[name])
                begun = time.perf_counter()
                for _ in range(launches):
                    x.add_(1.0)
                samples[name].append((time.perf_counter() - begun) / launches * 1e6)
                busy.switch(None)
                updates[name] += busy.done - before
                torch.cuda.current_stream().synchronize()
    finally:
        stack.balancer.shutdown()
    quiet = median(samples["quiet"])
    lost = {
        name: (median(samples[name]) - quiet) * launches * rounds / updates[name] for name in pauses if name != "quiet"
    }
    pairs = compare([[[sample] for sample in found] for found in samples.values()])
    return {
        "median_us": {name: median(found) for name, found in samples.items()}, "asked": 1.05, "updates": updates,
        "lost_us_per_update": lost, "ratio": {name: pair.ratio for name, pair in zip(samples, pairs, strict=True)},
        "interval": {name: [pair.low, pair.high] for name, pair in zip(samples, pairs, strict=True)},
        "samples_us": samples,
    }  # fmt: skip


@dataclass(slots=True)
class _Rested(Update):
    """An update before which the updater's thread rests, as it does until a load is there.

    `rest`: Return when it is over; whether the updater was stopped.
    """

    rest: Callable[[], bool] = field(kw_only=True)

    def begin(self) -> bool:
        """See the base class."""
        return not self.rest()


class Busy:
    """Keeps an updater at work: a plan for 256 experts on 32 ranks and a copy of 8 MB, again and again.

    Between two of them it rests in the compiled code in which the updater waits for the device.
    """

    def __init__(self, stack: Stack) -> None:
        self._updater, self._device = stack.balancer.updater, stack.balancer.device
        self._plan = Planning(compiled=True).planner()
        self._updater._planners[0] = 0, self._plan
        self._load = np.random.default_rng(1).gamma(0.7, 100.0, 256)
        self._placement = Placement(32, 256, initial_slots(256, 32, 9))
        self._source = torch.zeros(8 << 20, dtype=torch.uint8, pin_memory=True)
        self._target = torch.zeros(8 << 20, dtype=torch.uint8, device=stack.x.device)
        self._copiers = deque(self._device.new_copier() for _ in range(2))
        self.done = 0
        self._latest: Update | None = None
        self._stopped = torch.zeros(1, dtype=torch.int32)
        self._rest: Callable[[], bool] = lambda: True
        self._plan(self._load, self._placement)  # compiled by now

    def switch(self, pause_s: float | None) -> None:
        """Begin with so long a rest before each update, or stop after the update under way."""
        if pause_s is not None:
            self._rest = partial(WatchingBell(self._stopped, longest_s=pause_s).wait, 1, 0.0)
            self._stopped.zero_()
            self._submit()
        elif self._latest is not None:
            self._stopped.fill_(1)
            latest = None
            while latest is not self._latest:  # the one under way submits another before it is done
                latest = self._latest
                if not latest.done.wait(10):
                    raise RuntimeError("the updater is still busy 10 s after it was stopped")

    def _submit(self) -> None:
        update = _Rested(0, self.done, self.done + 1, self._load, self._placement, self._stage, rest=self._rest)
        self._latest = update
        self._updater.submit(update)

    def _stage(self, plan: Plan) -> StagedWeights:
        copier = self._copiers[0]
        self._copiers.rotate()
        copier.wait()  # for the one before the last, as the balancer does
        copier.enqueue([(self._target, self._source)])
        self.done += 1
        self._submit()
        return StagedWeights()


def endless(replays: int, *, run_ahead: int, limited: bool = True) -> dict[str, Any]:
    """Replays with moves in every one, by a thread that never synchronises.

    Args:
        replays, run_ahead: How many, and how many the host may be ahead of the device.
        limited: Whether the host waits for the plans that the device is going to wait for.
    """
    device = CudaDevice(NullSink())
    options = ForcedOptions(
        resident=True,
        spare_slots=_FORCED,
        forced=_FORCED,
        run_ahead=run_ahead,
        update_timeout_s=_BOUND_S,
        empty_group="never",
        commit_delay=_DELAY,
    )
    updates = _LAYERS // _DELAY
    stacks = [build(_SMALL, _LAYERS, device, updates=each, slots=20, options=options) for each in (0, updates)]
    static, moving = stacks
    resident = moving.balancer._resident
    assert resident is not None
    if not limited:
        resident.await_plan = lambda update: None  # type: ignore[method-assign]
    try:
        for stack in stacks:
            stack.capture()
        moving.updating(True)
        begun = time.perf_counter()
        for _ in range(replays):
            moving.replay()
        launched = time.perf_counter() - begun
        moving.settle()
        took = time.perf_counter() - begun
        static.replay()
        torch.cuda.current_stream().synchronize()
        differs = not torch.equal(static.graph.result, moving.graph.result)  # type: ignore[union-attr]
    finally:
        for stack in stacks:
            stack.balancer.shutdown()
    counted = moving.moves
    return {
        "replays": replays, "run_ahead": run_ahead, "limited": limited, "launch_s": launched, "total_s": took,
        "run_ahead_waits": resident.run_ahead_waits, "plan_waits": resident.plan_waits, "commits": counted.commits,
        "slots_moved": counted.slots, "drops": counted.drops, "longest_wait_s": max(counted.stalls, default=0.0),
        "bound_s": _BOUND_S, "differs": differs,
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    rows = [
        [f"{name}, {what}", 30.0 if what == "median_us" else None, result[name][what]]
        for name in ("hand_over", "hand_over_awake")
        for what in ("median_us", "p99_us")
        if name in result
    ]
    if rate := result.get("launch_rate"):
        rows += [[f"launches, updates {name}", rate["asked"], ratio, *rate["interval"][name]]
                 for name, ratio in rate["ratio"].items()]  # fmt: skip
    click.echo(tabulate(rows, headers=["what", "asked", "seen", "low", "high"], floatfmt=".3f"))
    endless = [{**result[name]} for name in _ENDLESS if name in result]
    click.echo(tabulate(endless, headers="keys", floatfmt=".3f"))


if __name__ == "__main__":
    main()
