"""The thread that turns a layer's load into a plan with staged weights while the model goes on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import UPDATER, EventSink, Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan, plan

__all__ = ["Update", "Updater"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Update:
    """One update of one layer: taken at the end of iteration `taken`, to be committed at the start of `due`.

    `done` is set when the updater has finished, one way or the other: `plan` and `staged` are there, or `error` is.
    `agreed` is None until the ranks have voted.
    """

    layer: int
    taken: int
    due: int
    load: np.ndarray
    current: Placement
    stage: Callable[[Plan], StagedWeights]
    plan: Plan | None = None
    staged: StagedWeights | None = None
    error: Exception | None = None
    agreed: bool | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Updater:
    """Runs updates in order on one thread.

    Args:
        sink: Event sink for plan and staging records.
        timeout_s: The longest that anybody waits for an update.
        preserve_slots: See `planner.plan`.
    """

    def __init__(self, sink: EventSink, *, timeout_s: float, preserve_slots: bool) -> None:
        self._sink, self._timeout_s, self._preserve = sink, timeout_s, preserve_slots
        self._tasks: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="moe_eplb-updater", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, update: Update) -> None:
        """Queue an update; returns at once."""
        self._tasks.put(update)

    def wait(self, update: Update) -> bool:
        """Whether the update is ready, waiting at most the timeout. A dead or slow updater is a no, and is logged."""
        if not update.done.wait(self._timeout_s):
            _LOG.error(
                "layer %d: the update taken in iteration %d is not ready after %.1f s (updater %s)",
                update.layer, update.taken, self._timeout_s, "alive" if self._thread.is_alive() else "dead",
            )  # fmt: skip
            return False
        if update.error is not None:
            _LOG.error(
                "layer %d: the update taken in iteration %d failed: %s", update.layer, update.taken, update.error
            )
        return update.error is None

    def stop(self) -> None:
        """End the thread after the updates already queued; raises if it does not end within the timeout."""
        if not self._thread.is_alive():
            return
        self._tasks.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise BalancerError(
                "E138", "the updater did not end", why=f"still running {self._timeout_s} s after it was told to stop",
                hint="raise balancer.update_timeout_s, or look what holds it with py-spy",
            )  # fmt: skip

    def _serve(self) -> None:
        while (update := self._tasks.get()) is not None:
            try:
                self._prepare(update)
            except Exception as error:  # reported by whoever waits: the model must go on with the last good placement
                update.error = error
            finally:
                update.done.set()

    def _prepare(self, update: Update) -> None:
        token = self._sink.begin(Kind.PLAN, update.layer, update.taken, UPDATER)
        update.plan = plan(update.load, update.current, preserve_slots=self._preserve)
        self._sink.end(token, a=len(update.plan.changed), b=update.plan.placement.digest())
        token = self._sink.begin(Kind.STAGE_WEIGHTS, update.layer, update.taken, UPDATER)
        update.staged = update.stage(update.plan)
        self._sink.end(token, a=update.staged.bytes, b=len(update.staged.tensors))
