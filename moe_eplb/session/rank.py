"""One rank of a run, from its event log to its last row of evidence."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from pathlib import Path

import torch

from moe_eplb.balancer import MoeLoadBalancer, MoeLoadBalancerIterContext, get_moe_load_balancer
from moe_eplb.balancer.host_memory import list_segments
from moe_eplb.checks import EvidenceGatherer, TopkIds, watched_layer
from moe_eplb.core.events import Kind
from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.core.memory import memory_of
from moe_eplb.core.probe import Probes
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device, get_device
from moe_eplb.recording.event_log import EventLog
from moe_eplb.recording.metrics import MetricsFile
from moe_eplb.recording.torch_profiler import profiled
from moe_eplb.session.balancing import make_balancer
from moe_eplb.session.calls import run_calls
from moe_eplb.session.folder import events_path, evidence_path
from moe_eplb.session.groups import Groups
from moe_eplb.session.model import Model, make_model
from moe_eplb.session.result import Progress
from moe_eplb.session.weights import expert_dtype

__all__ = ["run_rank"]

_PARENT_WATCH = "moe_eplb-parent-watch"


def run_rank(scenario: Scenario, folder: Path, rank: int, groups: Groups, on_step: Progress) -> None:
    """Run this rank's part of a scenario and write its event log and evidence into the run folder."""
    started = time.monotonic()
    threads = set(threading.enumerate())
    with (
        EventLog(events_path(folder, rank), rank) as log,
        contextlib.closing(EvidenceWriter(evidence_path(folder, rank), rank)) as evidence,
        torch.inference_mode(),
    ):
        device = get_device(scenario.device, log, seed=scenario.stream_seed, rank=rank, check_order=True)
        balancer = make_balancer(scenario, rank, device, groups)
        _write_begin(evidence, scenario, balancer)
        try:
            if scenario.calls is not None:
                run_calls(scenario, balancer, device, evidence, groups)
            else:
                _Run(scenario, folder, rank, device, balancer, groups, evidence).iterate(on_step)
        finally:
            if balancer is not None:
                balancer.shutdown()
        _write_leaks(evidence, device, threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        done = 0 if scenario.calls is not None else scenario.iterations
        evidence.write(Row.END, iterations=done, seconds=time.monotonic() - started, peak_rss_bytes=peak)


class _Run:
    """A model under its balancer, watched by the checks."""

    def __init__(
        self,
        scenario: Scenario,
        folder: Path,
        rank: int,
        device: Device,
        balancer: MoeLoadBalancer | None,
        groups: Groups,
        evidence: EvidenceWriter,
    ) -> None:
        self._scenario, self._folder, self._rank = scenario, folder, rank
        self._device, self._balancer, self._evidence = device, balancer, evidence
        self._gatherer = _make_gatherer(scenario, rank, groups, evidence)
        self._metrics = MetricsFile(folder / "metrics.prom") if scenario.record.metrics and rank == 0 else None
        with balancer or contextlib.nullcontext():
            self._model = make_model(scenario, rank, device, groups, balancer)
        if balancer is not None:
            balancer.probe = Probes(self._gatherer, self._metrics.probe) if self._metrics else self._gatherer
            balancer.finalize_model()
            balancer.set_iter_info(enable_statistic=True, enable_update_weights=balancer.is_dynamic_routing())
            if scenario.balancer is not None:
                balancer.set_warm_up_iter_count(scenario.balancer.warm_up)
        self._watch_layers()
        _write_memory(evidence, scenario, self._model, balancer)

    def iterate(self, on_step: Progress) -> None:
        """Run all iterations, then read all weights back once more."""
        total = self._scenario.iterations
        with profiled(self._scenario, self._folder, self._rank) as iterated:
            for iteration in range(total):
                self._step(iteration)
                iterated()
                on_step(iteration + 1, total)
        self._gatherer.finish()
        self._model.finish(self._evidence)
        if self._gatherer.topk_ids is not None:
            self._gatherer.topk_ids.save(self._folder / f"topk_ids.rank{self._rank}.npz")

    def _step(self, iteration: int) -> None:
        self._device.iteration = self._gatherer.iteration = iteration
        forward = self._model.load(iteration)
        token = self._device.sink.begin(Kind.STEP, -1, iteration, self._device.main.index)
        with MoeLoadBalancerIterContext(self._balancer):
            forward()
        self._device.synchronize()
        if self._balancer is not None:
            self._balancer.collect()
        self._device.sink.end(token)
        token = self._device.sink.begin(Kind.CHECK, -1, iteration, self._device.main.index)
        self._device.settle()  # what was put off for a look at results, which takes many times as long as the step
        self._gatherer.end_iteration()
        if self._metrics is not None:
            self._metrics.write()
        self._device.sink.end(token)

    def _watch_layers(self) -> None:
        dtype = expert_dtype(self._scenario.model.dtype)
        for index, (block, master) in enumerate(zip(self._model.blocks, self._model.masters, strict=True)):
            block.moe.probe = self._gatherer
            slots, placement = block.moe.experts.by_slot(), block.moe.placement
            self._gatherer.watch(
                index,
                watched_layer(slots, master.experts, placement, dtype, block.moe.routing_method.rule, master.shared),
            )


def _make_gatherer(scenario: Scenario, rank: int, groups: Groups, evidence: EvidenceWriter) -> EvidenceGatherer:
    names = ("exactly_once", "equality", "attestation")
    gatherer = EvidenceGatherer(
        evidence, rank=rank, ranks=scenario.ranks, group=groups.checks,
        local_first=scenario.replica_choice == "local_first" or scenario.model.backend != "wide_ep",
        checks=frozenset(name for name in names if getattr(scenario.checks, name)),
    )  # fmt: skip
    repeats = [scenario.model.repeats(layer) for layer in range(scenario.model.layers)]
    gatherer.topk_ids = TopkIds(repeats) if scenario.record.topk_ids else None
    return gatherer


def _write_begin(evidence: EvidenceWriter, scenario: Scenario, balancer: MoeLoadBalancer | None) -> None:
    evidence.write(
        Row.BEGIN, pid=os.getpid(), ranks=scenario.ranks, layers=scenario.model.layers, experts=scenario.model.experts,
        slots=scenario.slots, top_k=scenario.model.top_k,
        dynamic=balancer is not None and balancer.is_dynamic_routing(), off=scenario.balancer_off_reason() or "",
    )  # fmt: skip
    evidence.flush()


def _write_memory(evidence: EvidenceWriter, scenario: Scenario, model: Model, balancer: MoeLoadBalancer | None) -> None:
    slots = sum(
        t.numel() * t.element_size() for b in model.blocks for slot in b.moe.experts.by_slot() for t in slot.values()
    )
    host = sum(layer.updates.host.host_bytes for layer in balancer.layers) if balancer is not None else 0
    evidence.write(Row.MEMORY, slots_bytes=slots, host_bytes=host, staging_bytes=memory_of(scenario).staging_bytes)


def _write_leaks(evidence: EvidenceWriter, device: Device, before: set[threading.Thread]) -> None:
    """What this scenario left behind in this process."""
    left = [t.name for t in threading.enumerate() if t not in before and t.name != _PARENT_WATCH]
    segments = [s.name for s in list_segments() if s.owner_pid == os.getpid()]
    current = get_moe_load_balancer()
    evidence.write(Row.LEAK, threads=left, segments=segments, pending=device.pending(), balancer=current is not None)
