"""On a GPU the older choreography keeps to the caller's stream while work is launched, and to its own in a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_eplb.analysis.trace import Records, read_trace
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.events import STREAMS, Kind
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool

TEXT = """\
name: older
ranks: 1
iterations: 8
timeout_s: 120
device: cuda
execution: graph
overlap: before
dispatch: allgather
model: {layers: 2, experts: 16, top_k: 2, hidden: 64, intermediate: 64, dtype: bfloat16}
workload: {kind: zipf, tokens_per_rank: 64, drift_every: 2}
balancer: {num_slots: 20, layer_updates_per_iter: 2, empty_group: never, state: device, alone: true}
"""
LOCK = (Kind.START_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE)
STATISTICS = (Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, Kind.LOAD_UPDATE, Kind.VOTE, Kind.SETTLE_VOTE)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def scenario(*changes: str) -> Scenario:
    return scenarios.loads(TEXT, "older.yaml", changes)


def _streams(records: Records, kinds: tuple[Kind, ...]) -> set[str]:
    return {STREAMS[number] for number in records.device.kinds(*kinds).stream.tolist()}


def test_the_scenarios_are_acceptable() -> None:
    assert scenario().statistics_path == scenario("execution=eager").statistics_path == "global_ids"


@NEEDS_GPU
def test_it_overlaps_in_replays_alone(tmp_path: Path) -> None:
    with RankPool() as pool:
        result = pool.run(scenario(), tmp_path / "run")
    found = {check.name: check.detail for check in result.verdict.checks if check.status is not Status.VALID}
    assert (found, result.verdict.failure) == ({}, "")
    records = read_trace(tmp_path / "run" / "trace.sqlite").records
    launched, replayed = records.where(records.iteration == 0), records.where(records.iteration > 0)
    assert _streams(launched, LOCK + STATISTICS) == {"Main"}
    assert _streams(replayed, LOCK) == {"MoeBalancer"}
    assert _streams(replayed, STATISTICS) == {"MoeBalancerStatistic"}


@NEEDS_GPU
def test_launched_work_stays_on_the_callers_stream(tmp_path: Path) -> None:
    with RankPool() as pool:
        result = pool.run(scenario("execution=eager"), tmp_path / "run")
    assert result.verdict.status is Status.VALID, result.verdict
    records = read_trace(tmp_path / "run" / "trace.sqlite").records
    assert _streams(records, LOCK + STATISTICS) == {"Main"}
