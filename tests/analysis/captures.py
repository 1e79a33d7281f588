"""Captures made by hand, event by event, for the analyses that do not care where one comes from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, Capture, Names, Table
from moe_eplb.core.events import Role

__all__ = ["MakeCapture", "stalled"]


class MakeCapture:
    """Add events in any order, then `done`."""

    def __init__(self) -> None:
        self._names = Names()
        self._rows: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("gpu", "calls", "ranges", "syncs", "spans")
        }
        self._streams: dict[tuple[int, int, int], str] = {}

    def gpu(self, role: Role | None, start: int, end: int, stream: int = 7, name: str = "kernel", **more: Any) -> None:
        """A GPU event of a role, or of none yet."""
        code = c.UNSET_ROLE if role is None else ROLE_CODE[role]
        self._add("gpu", start, end, stream=stream, name=self._names[name], role=code, **{"device": 0} | more)

    def call(self, start: int, end: int, correlation: int, name: str = "cudaLaunchKernel", thread: int = 1) -> None:
        """A runtime call."""
        self._add("calls", start, end, correlation=correlation, name=self._names[name], thread=thread)

    def launched(self, role: Role | None, launch: int, start: int, end: int, stream: int = 7, **more: Any) -> int:
        """A GPU event with its launching call, which takes 2 ns; the call's correlation."""
        correlation = len(self._rows["calls"]) + 1
        self.call(launch, launch + 2, correlation, thread=more.pop("thread", 1))
        self.gpu(role, start, end, stream, correlation=correlation, **more)
        return correlation

    def wait(self, stream: int, on: int, at: int, record: int | None = None, device: int = 0) -> None:
        """From `at` on a stream waits for all that was launched on another one before.

        Args:
            record: Correlation of the call that recorded the event; that call is then not in the capture.
        """
        first = len(self._rows["calls"]) + 1
        if record is None:
            self.call(at, at + 1, first, "cudaEventRecord")
        self.call(at + 1, at + 2, first + 1, "cudaStreamWaitEvent")
        on_correlation = first if record is None else record
        more = {"stream": stream, "on_stream": on, "on_correlation": on_correlation, "correlation": first + 1}
        self._add("syncs", at + 1, at + 2, kind=c.SYNC_WAIT, device=device, **more)

    def range(self, text: str, start: int, end: int, domain: str = "", thread: int = 1, **more: Any) -> None:
        """A host range."""
        self._add("ranges", start, end, text=self._names[text], domain=self._names[domain], thread=thread, **more)

    def span(self, kind: int, start: int, end: int) -> None:
        """Overhead, or a function that a stream called."""
        self._add("spans", start, end, kind=kind, thread=1)

    def stream(self, stream: int, name: str, rank: int = 0, device: int = 0) -> None:
        """Give a stream its name."""
        self._streams[rank, device, stream] = name

    def done(self) -> Capture:
        """The capture."""
        types = {"gpu": c.GPU, "calls": c.CALL, "ranges": c.RANGE, "syncs": c.SYNC, "spans": c.HOST_SPAN}
        tables = {name: _table(types[name], rows) for name, rows in self._rows.items()}
        made = Capture("made by hand", "test", tuple(self._names), tables.pop("gpu"), streams=self._streams)
        return made.with_tables(tables).in_order()

    def _add(self, table: str, start: int, end: int, **columns: Any) -> None:
        rank = columns.pop("rank", 0)
        self._rows[table].append({"start": start, "end": end, "rank": rank, "process": rank} | columns)


def stalled(migrated_until: int) -> Capture:
    """Main computes until 100; then what it launched at 50 waits for a migration, and runs from 150 at the earliest."""
    main, balancer = 7, 20
    made = MakeCapture()
    made.stream(main, "Main")
    made.launched(Role.COMPUTE, 0, 10, 100, iteration=2)
    made.launched(Role.EPLB_MIGRATE, 20, 30, migrated_until, balancer, iteration=2)
    made.wait(main, balancer, at=40)
    made.launched(Role.COMPUTE, 50, max(150, migrated_until + 5), 200, iteration=2)
    return made.done()


def _table(dtype: np.dtype[Any], rows: list[dict[str, Any]]) -> Table:
    table = c.filled(dtype, len(rows))
    for number, row in enumerate(rows):
        for name, value in row.items():
            table[name][number] = value
    return table
