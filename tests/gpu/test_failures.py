"""On a GPU too: a dead or late updater costs one bounded wait and no wrong output, a lost peer ends the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.run_folder import RunFolder
from moe_eplb.balancer.host_memory import list_segments
from moe_eplb.balancer.updater import Update, Updater
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ExitCode
from moe_eplb.core.evidence import Row
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status, Verdict
from moe_eplb.session import RankPool
from moe_eplb.session.folder import close_folder, open_folder
from moe_eplb.session.groups import Groups
from moe_eplb.session.rank import run_rank

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(100)]

TIMEOUT_S = 0.5
ITERATIONS = 40
FAILS_AFTER = 12
"""Plans."""
TEXT = f"""\
name: failures
ranks: 1
iterations: {ITERATIONS}
timeout_s: 60
device: cuda
model: {{layers: 3, experts: 16, top_k: 2, hidden: 64, intermediate: 64, dtype: bfloat16}}
workload: {{kind: zipf, tokens_per_rank: 64, drift_every: 2}}
balancer:
  {{num_slots: 22, layer_updates_per_iter: 3, empty_group: never, state: device, alone: true,
   update_timeout_s: {TIMEOUT_S}}}
"""
RIGHT = ("equality", "attestation", "exactly_once", "agreement", "leaks", "run_complete")
"""What holds whether plans come or not."""
MODES = ["eager", "graph"]


class Run(NamedTuple):
    """A run of one rank in this process."""

    verdict: Verdict
    folder: RunFolder
    seconds: float

    def iterations(self, row: Row) -> list[int]:
        """In which iterations such rows were written, in order."""
        return sorted(found["iteration"] for found in self.folder.evidence.rows(row))

    def waits(self) -> list[float]:
        """Seconds that the device waited for each plan for which it did wait, as it says itself."""
        rows = [*self.folder.evidence.rows(Row.PLAN), *self.folder.evidence.rows(Row.DROPPED)]
        return [row["stall_us"] / 1e6 for row in rows if row["stall_us"] > 1000]

    def placements(self) -> dict[int, list[str]]:
        """By iteration, the digest of each layer's placement."""
        found: dict[int, list[str]] = {}
        for row in self.folder.evidence.rows(Row.PLACEMENT):
            found.setdefault(row["iteration"], []).append(row["digest"])
        return found

    def assert_right(self) -> None:
        """Every output is the reference's, and every slot holds the weights of its expert."""
        assert self.verdict.failure == ""
        status = {check.name: (check.status, check.detail) for check in self.verdict.checks}
        assert {name: status[name] for name in RIGHT if status[name][0] is not Status.VALID} == {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a rank's process: what the checks compute on the host is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(mode: str, folder: Path, on_step: Callable[[int], None] = lambda done: None) -> Run:
    scenario = scenarios.loads(TEXT, "failures.yaml", [f"execution={mode}"])
    open_folder(folder, scenario, launcher="spawn", argv=())
    begun = time.monotonic()
    run_rank(scenario, folder, 0, Groups(None, None, None, None), lambda done, total: on_step(done))
    seconds = time.monotonic() - begun
    return Run(close_folder(folder, scenario), run_folder.load(folder), seconds)


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, fail: Callable[[], None]) -> list[int]:
    """Call `fail` on the updater's thread before its plan `number`; the iterations of the plans that were begun."""
    begun: list[int] = []
    planner_of = Updater._planner_of

    def planned(updater: Updater, update: Update) -> Any:
        begun.append(update.taken)
        if len(begun) == number:
            fail()
        return planner_of(updater, update)

    monkeypatch.setattr(Updater, "_planner_of", planned)
    return begun


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_updater_leaves_the_last_placement_and_right_outputs(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def die() -> None:
        raise SystemExit("killed")

    begun = fail_at(monkeypatch, FAILS_AFTER, die)
    found = run(mode, tmp_path / "run")
    found.assert_right()
    assert len(begun) == FAILS_AFTER
    commits, dropped = found.iterations(Row.COMMIT), found.iterations(Row.DROPPED)
    assert commits
    assert max(commits) <= begun[-1] + 1, "nothing is committed any more"
    assert max(dropped) == ITERATIONS - 1, "each plan that is not made is reported"
    placements = found.placements()
    assert all(placements[later] == placements[max(commits)] for later in range(max(commits), ITERATIONS))
    assert "the updater is dead" in caplog.text
    waits = found.waits()
    print(f"{mode}: {found.seconds:.1f} s, waits {waits}, {len(commits)} commits, {len(dropped)} dropped")
    assert sum(waits) < 3 * TIMEOUT_S + 1


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_that_comes_too_late_is_dropped_after_one_wait_and_later_ones_work(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def on_step(done: int) -> None:
        if done == ITERATIONS // 2:
            release.set()
            time.sleep(0.5)  # what has piled up is stale and quickly gone through

    begun = fail_at(monkeypatch, FAILS_AFTER, lambda: bool(release.wait(30)) or None)
    try:
        found = run(mode, tmp_path / "run", on_step)
    finally:
        release.set()
    found.assert_right()
    late = begun[FAILS_AFTER - 1]
    dropped, commits = found.iterations(Row.DROPPED), found.iterations(Row.COMMIT)
    assert late + 1 in dropped
    assert not [at for at in commits if late + 1 < at < ITERATIONS // 2], "the updater was held"
    assert [at for at in commits if at >= ITERATIONS // 2], "later plans are committed"
    assert "is not ready after" in caplog.text
    waits = found.waits()
    print(f"{mode}: {found.seconds:.1f} s, waits {waits}, {len(commits)} commits, {len(dropped)} dropped")
    assert TIMEOUT_S <= max(waits) < 2 * TIMEOUT_S, "the wait is bounded"
    assert sum(waits) < 3 * TIMEOUT_S, "and is not repeated for each plan"


def peers(how: str) -> Scenario:
    changes = [
        "ranks=2",
        "iterations=3000",
        "balancer.alone=false",
        "balancer.num_slots=24",
        "balancer.update_timeout_s=2",
    ]
    return scenarios.loads(TEXT, "failures.yaml", [*changes, *PEERS[how]])


PEERS = {
    "host": ["share_gpus=true", "balancer.state=host"],
    "device": ["share_gpus=true"],
    "nccl": ["dispatch=allgather"],
    "nccl_graph": ["dispatch=allgather", "execution=graph", "balancer.weights_from=peer"],
}
"""Two ranks on one GPU, and on two."""


@pytest.mark.parametrize("how", list(PEERS))
def test_a_lost_peer_ends_the_run_with_its_cause_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    if how.startswith("nccl") and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool, killed_at, pids = RankPool(), list[float](), list[int]()

    def on_step(done: int, total: int) -> None:
        if done == 4:
            killed_at.append(time.monotonic())
            pids.extend(pool.pids())
            os.kill(pids[1], signal.SIGKILL)

    with pool:
        result = pool.run(peers(how), tmp_path / "run", progress=on_step)
        seconds = time.monotonic() - killed_at[0]
        assert multiprocessing.active_children() == []
    assert result.exit_code is ExitCode.FAILED
    assert "rank 1 died: killed by signal 9" in result.verdict.failure
    assert "last event of rank 1: " in result.verdict.failure
    assert [segment.name for segment in list_segments() if segment.owner_pid in pids] == []
    print(f"{how}: ended {seconds:.1f} s after the rank was killed")
    assert seconds < 20
