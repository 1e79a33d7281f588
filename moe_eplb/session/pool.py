"""The parent's side: rank processes that are started once, run one scenario after another, and never outlive a hang."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import TracebackType

from moe_eplb.balancer.host_memory import clean_segments
from moe_eplb.core.errors import RunFailed
from moe_eplb.core.scenario import Scenario
from moe_eplb.planning.online import prepare_for
from moe_eplb.recording.profilers import require_wrapped, wrapped
from moe_eplb.session import fork_server
from moe_eplb.session.entry import rank_main
from moe_eplb.session.folder import close_folder, open_folder
from moe_eplb.session.messages import Job, Timing
from moe_eplb.session.postmortem import last_events
from moe_eplb.session.result import Progress, RunResult
from moe_eplb.session.samples import write_variants
from moe_eplb.session.unnamed_file import UnnamedFile
from moe_eplb.session.watch import STOP_S, Rank, Watch

__all__ = ["RankPool", "run_scenario"]

_START_S = 120.0


class RankPool:
    """Rank processes of this node, started on demand and kept for the next scenario.

    A scenario of n ranks runs on the first n, the others wait; one that needs all ranks that there are starts n anew.
    After a failure all are killed; the next scenario starts anew.
    """

    def __init__(self) -> None:
        self._ranks: list[Rank] = []
        self._store: UnnamedFile | None = None
        self._abandoned = False
        # The server that forks the ranks imports torch once for all of them; on two cores that saves seconds a rank.
        # Under Nsight Systems each rank is a program of its own: what is forked without exec is not seen, or hangs.
        self._context: ForkServerContext | SpawnContext = (
            multiprocessing.get_context("spawn") if wrapped() else multiprocessing.get_context("forkserver")
        )
        self._context.set_forkserver_preload([] if wrapped() else ["moe_eplb.session.worker"])

    def run(
        self, scenario: Scenario, folder: Path, *, progress: Progress | None = None, argv: Sequence[str] = ()
    ) -> RunResult:
        """Run a scenario into `folder` and judge it; a dead or hanging rank ends it within the scenario's timeout."""
        started = time.monotonic()
        require_wrapped(scenario.record.recorder)
        open_folder(folder, scenario, launcher="spawn", argv=argv)
        clean_segments()
        failure = ""
        try:
            prepare_for([scenario])
            self._drive([scenario], Job(str(folder)), time.monotonic() + scenario.timeout_s, progress)
        except RunFailed as error:
            failure = f"{error}\n{last_events(folder, scenario.ranks)}"
            self.kill()
        except BaseException:
            self.kill()
            raise
        if scenario.record.recorder == "torch":
            self.close()  # a process takes one capture: those after it would give graph replays wrong correlations
        verdict = close_folder(folder, scenario, failure=failure)
        return RunResult(folder, verdict, time.monotonic() - started)

    def compare(
        self, variants: Sequence[Scenario], timing: Timing, folder: Path, *, progress: Progress | None = None
    ) -> None:
        """Time variants of one scenario in turns; each rank leaves its samples in `folder`, beside the variants.

        Raises:
            RunFailed: When a rank failed, or they took longer than the first one's timeout allows for.
        """
        clean_segments()
        job = Job(str(folder), len(variants), timing)
        try:
            prepare_for(variants)
            write_variants(folder, variants)
            self._drive(variants, job, time.monotonic() + variants[0].timeout_s, progress)
        except BaseException:
            self.kill()
            raise

    def reserve(self, size: int, *, timeout_s: float = _START_S) -> None:
        """Have at least `size` ranks, so that later scenarios of up to that size find them; RunFailed when not."""
        if len(self._ranks) < size:
            self.close()
            self._start(size, timeout_s)

    def pids(self) -> list[int]:
        """Process ids of the ranks."""
        return [rank.process.pid or 0 for rank in self._ranks]

    def _drive(self, variants: Sequence[Scenario], job: Job, deadline: float, progress: Progress | None) -> None:
        scenario = variants[0]
        if len(self._ranks) > scenario.ranks and any(variant.needs_all_ranks for variant in variants):
            self.close()
        self.reserve(scenario.ranks, timeout_s=min(_START_S, max(0.0, deadline - time.monotonic())))
        for rank in self._ranks:  # those beyond the scenario's ranks only help to make its process groups
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the sentinel tells how the rank ended
                rank.pipe.send(job)
        Watch(self._ranks, deadline, scenario, progress).until_done()

    def _start(self, size: int, timeout_s: float) -> None:
        """Start the ranks in another thread: no signal interrupts it, so whatever was started is known and ended."""
        started = concurrent.futures.Future[None]()
        self._abandoned = False
        thread = threading.Thread(target=self._start_ranks, args=(size, started), name="moe_eplb-start")
        try:
            thread.start()
            started.result(timeout_s)
        except BaseException as error:
            late = isinstance(error, TimeoutError) and not started.done()  # afterwards the start has ended in any case
            self._abandon(thread)
            if late:
                what = f"the ranks did not start within {timeout_s:.3g} s"
                raise RunFailed("E181", what, hint="raise timeout_s if they are slow") from error
            if isinstance(error, OSError | EOFError):
                why = str(error) or "the server that forks them died"
                raise RunFailed("E184", "the ranks could not be started", why=why) from error
            raise
        thread.join()

    def _abandon(self, thread: threading.Thread) -> None:
        """End a start that is under way: without its server the thread has nothing to wait for."""
        self._abandoned = True
        fork_server.stop()
        thread.join(1.0)
        fork_server.stop()  # once more, since a rank that was about to be started then has started it anew
        thread.join()

    def _start_ranks(self, size: int, started: concurrent.futures.Future[None]) -> None:
        try:
            self._start_each(size)
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)

    def _start_each(self, size: int) -> None:
        self._store = UnnamedFile()
        fork_server.start()
        for number in range(size):
            if self._abandoned:
                return
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=rank_main, args=(number, size, self._store, theirs), name=f"rank{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append(Rank(process, ours))

    def close(self) -> None:
        """End the processes; kills those that do not end by themselves."""
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended already
                rank.pipe.send(None)
        deadline = time.monotonic() + STOP_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill all processes at once and remove what they leave behind."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join(STOP_S)
            rank.pipe.close()
        self._ranks.clear()
        clean_segments()
        if (store := self._store) is not None:
            self._store = None
            store.close()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.kill()


def run_scenario(
    scenario: Scenario, folder: Path, *, progress: Progress | None = None, argv: Sequence[str] = ()
) -> RunResult:
    """Run one scenario on ranks of its own."""
    with RankPool() as pool:
        return pool.run(scenario, folder, progress=progress, argv=argv)
