"""The recorder ``torch``: the last iterations, all threads, one redacted file a rank or none."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError, TraceError, UsageError
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.recording import profilers, torch_profiler
from moe_eplb.recording.torch_profiler import kineto_path, profiled
from moe_eplb.session import RankPool

TEXT = """\
name: recorded
ranks: 2
iterations: 5
model: {layers: 2, experts: 4, top_k: 2, hidden: 16, intermediate: 8}
workload: {kind: zipf, tokens_per_rank: 8}
balancer: {slots_per_rank: 3, layer_updates_per_iter: 1}
"""


def _scenario(*changes: str) -> Scenario:
    return scenarios.loads(TEXT, "recorded.yaml", changes)


@pytest.fixture(autouse=True)
def without_profilers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (profilers.WRAPPED, "NSYS_PROFILING_SESSION_ID", "CUDA_INJECTION64_PATH"):
        monkeypatch.delenv(name, raising=False)


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return document


def _names(document: dict[str, Any], category: str) -> list[str]:
    return [event["name"] for event in document["traceEvents"] if event.get("cat") == category]


def _iterate(scenario: Scenario, folder: Path, fail_at: int | None = None) -> None:
    """In iteration i a matrix of i + 1 rows is multiplied, in another thread a vector is summed."""
    with profiled(scenario, folder, 1) as iterated:
        for iteration in range(scenario.iterations):
            if iteration == fail_at:
                raise ValueError("the model broke")
            torch.ones(iteration + 1, 2) @ torch.ones(2, 2)
            thread = threading.Thread(target=lambda: torch.ones(3).cumsum(0))
            thread.start()
            thread.join()
            iterated()


@pytest.mark.parametrize("active", [1, 3, 4])
def test_the_last_iterations_of_all_threads_are_recorded(active: int, tmp_path: Path) -> None:
    _iterate(_scenario("record.recorder=torch", f"record.profile_iterations={active}"), tmp_path)
    assert list(tmp_path.iterdir()) == [kineto_path(tmp_path, 1)]
    document = _read(kineto_path(tmp_path, 1))
    steps = [name for name in _names(document, "user_annotation") if name.startswith("ProfilerStep")]
    assert sorted(steps) == [f"ProfilerStep#{number}" for number in range(5 - active, 5)]
    operations = _names(document, "cpu_op")
    assert (operations.count("aten::mm"), operations.count("aten::cumsum")) == (active, active)
    assert document["moe_eplb"] == {"rank": 1, "first_iteration": 5 - active, "iterations": active}


def test_the_file_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-of-nobody")
    _iterate(_scenario("record.recorder=torch"), tmp_path)
    document = _read(kineto_path(tmp_path, 1))
    assert str(tmp_path) not in json.dumps(document)
    assert document.get("host_name", "(removed)") == "(removed)"


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    _iterate(_scenario(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("iteration", [0, 1, 2, 4])
def test_a_run_that_fails_leaves_no_file_and_its_own_error(iteration: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model broke"):
        _iterate(_scenario("record.recorder=torch"), tmp_path, fail_at=iteration)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_redacted_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> list[str]:
        raise TraceError("E068", "a capture cannot be redacted", where=str(path))

    monkeypatch.setattr(torch_profiler, "redact", fails)
    with pytest.raises(TraceError, match="E068"):
        _iterate(_scenario("record.recorder=torch"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_nsys_has_started_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profilers.WRAPPED, "x")
    with pytest.raises(UsageError, match="E019"):
        _iterate(_scenario("record.recorder=torch"), tmp_path)


@pytest.mark.parametrize("changes", [("record.profile_iterations=5",), ("iterations=3",)])
def test_the_profiler_needs_an_iteration_to_warm_up(changes: tuple[str, ...]) -> None:
    with pytest.raises(ScenarioError, match="warm up"):
        _scenario("record.recorder=torch", *changes)
    _scenario(*changes)


def test_scripted_calls_have_no_iteration_to_record() -> None:
    with pytest.raises(ScenarioError, match="no iteration to record"):
        _scenario("record.recorder=torch", "calls=[{call: start_iter}]")


def test_every_rank_of_a_run_is_recorded_and_each_run_by_processes_of_its_own(tmp_path: Path) -> None:
    scenario = _scenario("record.recorder=torch", "record.profile_iterations=2")
    pids = []
    with RankPool() as pool:
        for name in ("first", "second"):
            result = pool.run(scenario, tmp_path / name)
            assert result.verdict.status is Status.VALID
            documents = [_read(kineto_path(tmp_path / name, rank)) for rank in range(2)]
            assert [document["moe_eplb"]["rank"] for document in documents] == [0, 1]
            assert all("aten::mm" in _names(document, "cpu_op") for document in documents)
            meta = json.loads((tmp_path / name / "meta.json").read_text())
            assert meta["recorder"] == "torch"
            pids.append({event["pid"] for event in documents[0]["traceEvents"] if event.get("cat") == "cpu_op"})
            assert pool.pids() == []
    assert pids[0].isdisjoint(pids[1])
