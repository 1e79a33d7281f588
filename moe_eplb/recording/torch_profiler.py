"""The recorder ``torch``: the torch profiler (Kineto) around the last iterations of a run.

It sees every operation of every thread and, on a GPU, every kernel, copy and wait, also those of a graph replay.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_eplb.core.errors import RunFailed
from moe_eplb.core.scenario import Scenario
from moe_eplb.recording.profilers import require_no_profiler
from moe_eplb.recording.redact import redact

__all__ = ["kineto_path", "profiled"]

_WARM_UP = 1
"""Iterations that the profiler sees and throws away: in its first one it is busy with itself."""


def kineto_path(folder: Path, rank: int) -> Path:
    """Chrome JSON of a rank."""
    return folder / f"kineto.rank{rank}.json.gz"


@contextlib.contextmanager
def profiled(scenario: Scenario, folder: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Record the last ``record.profile_iterations`` where the scenario asks for it; yields what ends an iteration.

    Each rank writes one redacted file when the last iteration has ended, so that no recorded one waits for a write. A
    run that fails before leaves none.

    Raises:
        UsageError: E019 another profiler has started this process.
        RunFailed: E186 the profiler did not record what it was told to.
        TraceError: E068 its file could not be redacted; it is removed then.
    """
    if scenario.record.recorder != "torch":
        yield lambda: None
        return
    require_no_profiler("torch")
    recording = _Recording(scenario, folder, rank)
    with recording.profiler:
        yield recording.iterated
    recording.require_written()


class _Recording:
    """The profiler of one rank and its schedule."""

    def __init__(self, scenario: Scenario, folder: Path, rank: int) -> None:
        from torch import profiler
        from torch._C._profiler import _ExperimentalConfig

        active = scenario.record.profile_iterations
        self._first, self._done, self._rank = scenario.iterations - active, 0, rank
        self._iterations, self._path = scenario.iterations, kineto_path(folder, rank)
        activities = [profiler.ProfilerActivity.CPU]
        if scenario.device == "cuda":
            activities.append(profiler.ProfilerActivity.CUDA)
        self.profiler: Any = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=self._first - _WARM_UP, warmup=_WARM_UP, active=active, repeat=1),
            on_trace_ready=self._write,
            # The updater has a thread of its own; waits for events are what a stall is read from.
            experimental_config=_ExperimentalConfig(
                profile_all_threads=True, enable_cuda_sync_events=scenario.device == "cuda"
            ),
        )

    def iterated(self) -> None:
        """An iteration has ended."""
        self._done += 1
        if self._done == self._iterations:
            self._note()
        self.profiler.step()

    def _note(self) -> None:
        """Say in the file which iterations it holds; the profiler takes notes only while it records."""
        note = {"rank": self._rank, "first_iteration": self._first, "iterations": self._iterations - self._first}
        self.profiler.add_metadata_json("moe_eplb", json.dumps(note))

    def _write(self, profiler: Any) -> None:
        if self._done < self._iterations:
            return  # the run has failed: half an iteration is no record
        raw = self._path.with_name(f".{self._path.name}")
        try:
            profiler.export_chrome_trace(str(raw))
            redact(raw)
            raw.replace(self._path)
        finally:
            raw.unlink(missing_ok=True)

    def require_written(self) -> None:
        """Raise unless there is a file: what was asked for is not left out silently."""
        if not self._path.exists():
            raise RunFailed("E186", "the torch profiler recorded nothing", where=str(self._path))
