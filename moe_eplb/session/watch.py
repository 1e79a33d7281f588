"""Waits for what the ranks of a job say and how they end, never without a bound."""

from __future__ import annotations

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from moe_eplb.core.errors import EplbError, RunFailed
from moe_eplb.core.scenario import Scenario
from moe_eplb.session.messages import Done, Failed, Message, Step
from moe_eplb.session.result import Progress

__all__ = ["STOP_S", "Rank", "Watch"]

STOP_S = 10.0
"""How long a process that has been told to end, or has died, is waited for."""
_GRACE_S = 2.0
"""How long the other ranks may go on once one rank has failed, so that a common cause is reported by all."""
# A rank that died explains the errors of those that were talking to it, and a known error the breakdowns it leads to.
_DEATH, _KNOWN, _UNFORESEEN = range(3)


class Rank(NamedTuple):
    """A rank's process, and the pipe that it answers through."""

    process: BaseProcess
    pipe: Connection


class Watch:
    """Waits for messages and deaths of the ranks of one job, never longer than to its deadline."""

    def __init__(self, members: Sequence[Rank], deadline: float, scenario: Scenario, progress: Progress | None) -> None:
        self._number = {member.pipe: rank for rank, member in enumerate(members)}
        self._sentinel = {member.process.sentinel: rank for rank, member in enumerate(members)}
        self._process = [member.process for member in members]
        self._deadline, self._scenario, self._progress = deadline, scenario, progress
        self._failures: dict[int, tuple[int, str]] = {}

    def until_done(self) -> None:
        """Return when every rank is done; RunFailed when one died, failed or is late."""
        while self._number:
            ready = wait([*self._number, *self._sentinel], max(0.0, self._deadline - time.monotonic()))
            if not ready:
                break
            for item in ready:
                if isinstance(item, Connection):
                    self._receive(item)
            for item in ready:
                if isinstance(item, int) and item in self._sentinel:
                    self._died(self._sentinel.pop(item))
        if self._failures:
            raise self._failed()
        if self._number:
            raise self._late()

    def _receive(self, pipe: Connection) -> None:
        try:
            message: Message = pipe.recv()
        except (EOFError, ConnectionResetError):
            return  # the sentinel tells how the rank ended
        rank = self._number[pipe]
        match message:
            case Step(done, total):
                if self._progress is not None and rank == 0:
                    self._progress(done, total)
            case Done():
                del self._number[pipe]
            case Failed(error):
                del self._number[pipe]
                self._fail(rank, _KNOWN if isinstance(error, EplbError) else _UNFORESEEN, str(error))

    def _died(self, rank: int) -> None:
        pipes = [pipe for pipe, number in self._number.items() if number == rank]
        if not pipes:
            return  # it had answered already
        del self._number[pipes[0]]
        self._process[rank].join(STOP_S)
        self._fail(rank, _DEATH, f"rank {rank} died: {_how(self._process[rank].exitcode)}")

    def _fail(self, rank: int, order: int, text: str) -> None:
        self._failures[rank] = (order, text)
        self._deadline = min(self._deadline, time.monotonic() + _GRACE_S)

    def _failed(self) -> RunFailed:
        rank, (_, error) = min(self._failures.items(), key=lambda item: (item[1][0], item[0]))
        others = sorted(set(self._failures) - {rank} | set(self._number.values()))
        why = f"ranks {others} failed or were stopped after it" if others else "no other rank was affected"
        return RunFailed("E180", f"the run failed in rank {rank}", why=f"{error}; {why}")

    def _late(self) -> RunFailed:
        late = sorted(self._number.values())
        return RunFailed(
            "E181", f"the run did not end within {self._scenario.timeout_s:g} s",
            why=f"ranks {late} were still running", hint="the last events say where; raise timeout_s if it is slow",
        )  # fmt: skip


def _how(exitcode: int | None) -> str:
    if exitcode is None:
        return "it is still ending"
    return f"killed by signal {-exitcode}" if exitcode < 0 else f"it ended with code {exitcode}"
