"""Ranks that die or hang end a run in time and leave nothing; ranks that live serve one scenario after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.reproduction import compare_placements
from moe_eplb.balancer.host_memory import list_segments
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ExitCode, RunFailed, UsageError
from moe_eplb.core.evidence import Row
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool, RunResult

ROOT = Path(__file__).resolve().parents[2]

TEXT = """\
name: pool
ranks: {ranks}
iterations: {iterations}
timeout_s: {timeout}
model: {{layers: 3, experts: 16, top_k: 2, hidden: 16, intermediate: 16}}
workload: {{kind: zipf, tokens_per_rank: 16, drift_every: 2}}
balancer: {{num_slots: 24, layer_updates_per_iter: 3, empty_group: never, update_timeout_s: 2}}
"""


def scenario(ranks: int = 2, iterations: int = 4, timeout: float = 60) -> Scenario:
    return scenarios.loads(TEXT.format(ranks=ranks, iterations=iterations, timeout=timeout), "pool.yaml")


def assert_nothing_left(pids: list[int]) -> None:
    """No process of this one and no segment of those ranks; other runs on this machine may have theirs."""
    assert pids
    assert multiprocessing.active_children() == []
    assert [s.name for s in list_segments() if s.owner_pid in pids] == []


def disturb(folder: Path, sent: signal.Signals, timeout: float) -> tuple[RunResult, float]:
    """Send a signal to rank 1 after the second iteration of a long run; the result, and seconds until it came."""
    pool, sent_at, pids = RankPool(), list[float](), list[int]()

    def on_step(done: int, total: int) -> None:
        if done == 2:
            sent_at.append(time.monotonic())
            pids.extend(pool.pids())
            os.kill(pids[1], sent)

    with pool:
        result = pool.run(scenario(iterations=3000, timeout=timeout), folder, progress=on_step)
        assert_nothing_left(pids)
    return result, time.monotonic() - sent_at[0]


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    result, seconds = disturb(tmp_path / "run", signal.SIGKILL, timeout=60)
    assert result.exit_code is ExitCode.FAILED
    assert "rank 1 died: killed by signal 9" in result.verdict.failure
    assert "last event of rank 1: " in result.verdict.failure
    assert "none, it had not started" not in result.verdict.failure
    assert seconds < 20


def test_a_stopped_rank_ends_the_run_at_its_timeout(tmp_path: Path) -> None:
    result, seconds = disturb(tmp_path / "run", signal.SIGSTOP, timeout=12)
    assert result.exit_code is ExitCode.FAILED
    assert "did not end within 12 s" in result.verdict.failure
    assert "last event of rank 1: " in result.verdict.failure
    assert seconds < 25


def test_a_stopped_rank_ends_the_run_of_a_scenario_larger_than_a_pipe(tmp_path: Path) -> None:
    large = scenario(timeout=6).model_copy(update={"description": "x" * 400_000})
    with RankPool() as pool:
        pool.run(scenario(), tmp_path / "before")
        pids = pool.pids()
        os.kill(pids[1], signal.SIGSTOP)
        # Whatever waits for the rank goes on when it dies, so that a wait without a bound fails and does not hang.
        killing = threading.Timer(25, os.kill, (pids[1], signal.SIGKILL))
        killing.start()
        result = pool.run(large, tmp_path / "run")
        killing.cancel()
        assert_nothing_left(pids)
    assert "did not end within 6 s" in result.verdict.failure
    assert result.seconds < 20


def test_a_start_that_is_too_slow_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_eplb.session.fork_server.start", lambda: time.sleep(1))
    with RankPool() as pool, pytest.raises(RunFailed, match=r"E181.* not start within 0.2 s\n  hint: raise timeout_s"):
        pool.reserve(2, timeout_s=0.2)
    assert multiprocessing.active_children() == []


def test_one_pool_serves_scenarios_of_several_sizes(tmp_path: Path) -> None:
    with RankPool() as pool:
        pool.reserve(4)
        pids = pool.pids()
        for number, ranks in enumerate((2, 4, 1, 2)):
            result = pool.run(scenario(ranks), tmp_path / str(number))
            assert result.verdict.failure == ""
            bad = [c for c in result.verdict.checks if c.status is not Status.VALID]
            assert bad == []
        assert pool.pids() == pids
    assert_nothing_left(pids)


def test_a_scenario_that_needs_all_ranks_starts_as_many_as_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RankPool() as pool:
        pool.reserve(3)
        pids = pool.pids()
        monkeypatch.setattr(Scenario, "needs_all_ranks", True)
        assert pool.run(scenario(2), tmp_path / "run").verdict.failure == ""
        assert (len(pool.pids()), len(set(pool.pids()) & set(pids))) == (2, 0)


def test_the_same_seed_gives_the_same_placements(tmp_path: Path) -> None:
    with RankPool() as pool:
        first, second = (run_folder.load(pool.run(scenario(), tmp_path / name).folder) for name in "ab")
    same = compare_placements(first, second)
    assert same.first_difference is None
    assert same.places == 3 * 4
    assert len({row["digest"] for row in first.evidence.rows(Row.PLACEMENT)}) > 3


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    with RankPool() as pool, pytest.raises(UsageError, match="already holds a run"):
        pool.run(scenario(), tmp_path)


ORPHAN = """
import multiprocessing, os, sys, time
from moe_eplb.session.entry import rank_main
from moe_eplb.session.unnamed_file import UnnamedFile

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["moe_eplb.session.worker"])
_, theirs = context.Pipe()
rank = context.Process(target=rank_main, args=(0, 2, UnnamedFile(), theirs), daemon=True)
rank.start()
time.sleep(float(sys.argv[1]))
os._exit(0)  # without a word to the rank, which waits for the other one
"""


@pytest.mark.parametrize("after", [0.0, 1.0, 2.0])
def test_a_rank_whose_parent_has_gone_ends_wherever_it_is(after: float) -> None:
    # The rank holds the other end of stdout too: reading it ends when the rank does.
    subprocess.run([sys.executable, "-c", ORPHAN, str(after)], capture_output=True, timeout=30, check=True, cwd=ROOT)
