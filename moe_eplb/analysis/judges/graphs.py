"""The order in replays of graphs, in which the host makes no call: what stands for the calls.

Four things together: the calls of each capture are legal and complete (`call_order` replays them too), the work of
each replay has device records in a legal order (`stream_join`), the device wrote down each stage of each layer in each
replay, and there is one replay for each iteration that has no calls.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import Place, RunFolder
from moe_eplb.analysis.trace import Records
from moe_eplb.core.events import CAPTURED, DEVICE_STAGES, KINDS, Kind
from moe_eplb.core.verdict import CheckResult

__all__ = ["graph_order"]

_WORK = (Kind.ROUTE, Kind.EXPERTS, Kind.COMBINE)
"""Work that every replayed layer has, whether experts move or not."""


def graph_order(folder: RunFolder) -> CheckResult:
    """Judge the replays of every rank."""
    findings = Findings("graph_order", "legal captures, one replay an iteration, each stage written down by the device")
    if folder.trace is None:
        findings.missing("the run left no trace")
        return findings.result("nothing")
    replays = 0
    for rank in folder.ranks:
        records = folder.trace.records.where(folder.trace.records.rank == rank)
        replayed = records.kinds(Kind.REPLAY).iteration.tolist()
        _judge_captures(folder, rank, records, findings)
        _judge_replays(folder, rank, records, replayed, findings)
        _judge_work(folder, rank, records, replayed, findings)
        if folder.moving:
            _judge_stages(folder, rank, records, replayed, findings)
        replays += len(replayed)
    return findings.result(f"{replays} replays on {len(folder.ranks)} ranks")


def _judge_captures(folder: RunFolder, rank: int, records: Records, findings: Findings) -> None:
    """Every graph that was replayed was captured, with the calls of every layer."""
    captured = set(records.kinds(Kind.CAPTURE).a.tolist())
    unknown = sorted(set(records.kinds(Kind.REPLAY).a.tolist()) - captured)
    if unknown:
        findings.missing(f"rank {rank}: no capture of graphs {unknown}")
    if not folder.moving:
        return
    begun = records.kinds(Kind.START_WAIT_GPU_STAGE)
    layers = Counter(begun.layer[begun.iteration == CAPTURED].tolist())
    for layer in range(folder.scenario.model.layers):
        if layers[layer] != len(captured):
            findings.wrong(f"rank {rank}: layer {layer} was called {layers[layer]} times in {len(captured)} captures")


def _judge_replays(folder: RunFolder, rank: int, records: Records, replayed: list[int], findings: Findings) -> None:
    """Every iteration has its forward once: by calls of its layers, or by one replay."""
    routed = records.host.kinds(Kind.ROUTE)
    called = set(routed.iteration[routed.iteration >= 0].tolist())
    count = Counter(replayed)
    begun = set(records.kinds(Kind.START_ITER).iteration.tolist())
    for iteration in sorted(count):
        if iteration not in range(folder.scenario.iterations) or (folder.moving and iteration not in begun):
            findings.wrong("a replay outside any iteration", f"rank {rank}, iteration {iteration}")
    for iteration in range(folder.scenario.iterations):
        where = f"rank {rank}, iteration {iteration}"
        if count[iteration] + (iteration in called) != 1:
            findings.wrong(f"{count[iteration]} replays, {'and' if iteration in called else 'no'} calls", where)
    if not replayed:
        findings.wrong(f"rank {rank}: not a single replay, so that nothing shows how graphs behave")


def _judge_work(folder: RunFolder, rank: int, records: Records, replayed: list[int], findings: Findings) -> None:
    """Each replay did the work of every layer."""
    device = records.device
    for kind in _WORK:
        found = device.kinds(kind)
        done = set(zip(found.layer.tolist(), found.iteration.tolist(), strict=True))
        for iteration in replayed:
            for layer in range(folder.scenario.model.layers):
                if (layer, iteration) not in done:
                    findings.missing(f"rank {rank}: no record of {KINDS[kind].name}", Place(layer, iteration))


def _judge_stages(folder: RunFolder, rank: int, records: Records, replayed: list[int], findings: Findings) -> None:
    """What the device wrote down itself, by the iteration number that it had before it."""
    noted = records.kinds(Kind.DEVICE_STAGE)
    rows = np.stack([noted.layer, noted.iteration, noted.a], axis=1)
    done = {tuple(row) for row in rows.tolist()}
    state = folder.trace.ranks.get(rank) if folder.trace is not None else None
    note = findings.wrong if state is not None and state.complete else findings.missing
    for iteration in replayed:
        for layer in range(folder.scenario.model.layers):
            missing = [name for stage, name in enumerate(DEVICE_STAGES) if (layer, iteration, stage) not in done]
            if missing:
                note(f"rank {rank}: the device did not do {', '.join(missing)}", Place(layer, iteration))
