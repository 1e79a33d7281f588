"""One rank of a comparison: variants of a scenario take turns in the same processes, so that noise meets all alike."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_eplb.balancer import MoeLoadBalancerIterContext
from moe_eplb.core.events import NullSink
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import get_device
from moe_eplb.session.balancing import make_balancer
from moe_eplb.session.groups import Groups
from moe_eplb.session.messages import Timing
from moe_eplb.session.model import make_model
from moe_eplb.session.result import Progress
from moe_eplb.session.samples import samples_path

__all__ = ["run_bench"]


def run_bench(
    variants: Sequence[Scenario], timing: Timing, folder: Path, rank: int, groups: Groups, on_step: Progress
) -> None:
    """Time the variants on this rank and write the samples, in ms, by variant and round.

    Rounds go forward and backward in turn (A B B A ...): what drifts meets each variant equally often, early and late.
    """
    weights = _rehearse(variants, timing, rank, groups) if timing.rehearsal else []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        running = [_Variant(scenario, rank, groups, stack) for scenario in variants]
        weights.clear()
        samples: list[list[list[float]]] = [[] for _ in variants]
        for index in range(timing.rounds):
            for number in _order(len(variants), index):
                samples[number].append(running[number].time(timing))
            on_step(index + 1, timing.rounds)
        found = {"samples_ms": samples, "device": _described(running[0].device.torch_device)}
        samples_path(folder, rank).write_text(json.dumps(found), encoding="utf-8")


def _rehearse(variants: Sequence[Scenario], timing: Timing, rank: int, groups: Groups) -> list[object]:
    """Run models of their own, so that kernels are loaded; returns their weights, which need not be drawn again."""
    weights: list[object] = []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for scenario in variants:
            variant = _Variant(scenario, rank, groups, stack)
            variant.time(Timing(1, timing.rehearsal, 0))
            weights += variant.masters
    return weights


def _order(count: int, index: int) -> Iterator[int]:
    return iter(range(count)) if index % 2 == 0 else reversed(range(count))


def _described(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"kind": device.type}
    return {"kind": "cuda", "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


class _Variant:
    """A model under its balancer without checks and records, which would take time of their own."""

    def __init__(self, scenario: Scenario, rank: int, groups: Groups, stack: contextlib.ExitStack) -> None:
        self.device = get_device(scenario.device, NullSink(), seed=scenario.stream_seed, rank=rank)
        self._balancer = make_balancer(scenario, rank, self.device, groups)
        if self._balancer is not None:
            stack.callback(self._balancer.shutdown)
        with self._balancer or contextlib.nullcontext():
            self._model = make_model(scenario, rank, self.device, groups, self._balancer)
        if self._balancer is not None:
            self._balancer.finalize_model()
            dynamic = self._balancer.is_dynamic_routing()
            self._balancer.set_iter_info(enable_statistic=dynamic, enable_update_weights=dynamic)
            if scenario.balancer is not None:
                self._balancer.set_warm_up_iter_count(scenario.balancer.warm_up)
        self._groups, self._done = groups, 0

    @property
    def masters(self) -> Sequence[object]:
        """What the model's weights were drawn as."""
        return self._model.masters

    def time(self, timing: Timing) -> list[float]:
        """Milliseconds of some steps, after others that are not counted; all ranks begin together.

        Steps follow each other without a pause, as in serving: a device that had to wait for each step's inputs would
        begin each of them at rest.
        """
        for _ in range(timing.warm_up):
            self._step()
        self._model.prefetch(range(self._done, self._done + timing.steps))
        self.device.synchronize()
        if self._groups.checks is not None:
            dist.barrier(self._groups.checks)
        taken = [self._step() for _ in range(timing.steps)]
        self.device.synchronize()
        return [self.device.elapsed_ms(begin, end) for begin, end in taken]

    def _step(self) -> tuple[object, object]:
        """One iteration; marks at its begin and end. Its inputs are there before it begins."""
        self.device.iteration = self._done
        forward = self._model.load(self._done)
        begin = self.device.time_mark()
        with MoeLoadBalancerIterContext(self._balancer):
            forward()
        self._done += 1
        return begin, self.device.time_mark()
