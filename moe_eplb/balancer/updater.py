"""The thread that turns a layer's load into a plan with staged weights while the model goes on."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moe_eplb.balancer.drop_log import is_told, which
from moe_eplb.balancer.migrate import StagedWeights
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import UPDATER, EventSink, Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.planning.online import Planner, Planning, prepare

__all__ = ["Update", "Updater"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Update:
    """One update of one layer: taken at the end of iteration `taken`, to be committed at the start of `due`.

    `done` is set when the updater has finished, one way or the other: `plan` and `staged` are there, or `error` is.
    `waited_s` is how long the thread that launches the model waited for it, before it enqueued what needs the plan.
    `agreed` is None until the ranks have voted, and False also when the update is given up before. `generation`: see
    `Updater.forget`.
    """

    layer: int
    taken: int
    due: int
    load: np.ndarray
    current: Placement
    stage: Callable[[Plan], StagedWeights]
    plan: Plan | None = None
    staged: StagedWeights | None = None
    error: BaseException | None = None
    agreed: bool | None = None
    generation: int = 0
    waited_s: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> bool:
        """On the updater's thread, before planning: whether there is something to plan for."""
        return True

    def finish(self) -> None:
        """On the updater's thread, after planning and staging, also after an error."""
        self.done.set()


class Updater:
    """Runs updates in order on one thread.

    Args:
        sink: Event sink for plan and staging records.
        timeout_s: The longest that anybody waits for an update.
        planning: How layers are planned.
        enter: Called by the thread when it starts, see `Device.enter_thread`.
    """

    def __init__(
        self, sink: EventSink, *, timeout_s: float, planning: Planning | None = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._enter = enter
        self._sink, self._timeout_s = sink, timeout_s
        self._planning = planning or Planning()
        self._generations: Counter[int] = Counter()
        self._failures: Counter[int] = Counter()
        """By layer, how many updates were not ready since one was."""
        self._planners: dict[int, tuple[int, Planner]] = {}
        self._tasks: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="moe_eplb-updater", daemon=True)
        self._overdue: Update | None = None
        self._stopping = False

    def start(self) -> None:
        """Start the thread; its planner is compiled by then."""
        prepare(self._planning)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; one that has died serves no update any more."""
        return self._thread.is_alive()

    def submit(self, update: Update) -> None:
        """Queue an update; returns at once."""
        update.generation = self._generations[update.layer]
        self._tasks.put(update)

    def forget(self, layer: int) -> None:
        """Plan later updates of a layer as if there had been none: a rank may have planned some of them alone."""
        self._generations[layer] += 1

    def wait(self, update: Update) -> bool:
        """Whether the update is ready, waiting at most the timeout. A dead or slow updater is a no, and is logged, of
        many in a row of a layer some (`is_told`).

        An updater that is dead, or still held by an update that was waited for in vain, is not waited for again.
        """
        patience = self._patience()
        ready = update.done.wait(patience)
        if ready and update.error is None:
            del self._failures[update.layer]
            return True
        if not ready and self._overdue is None:
            self._overdue = update
        self._failures[update.layer] += 1
        if is_told(number := self._failures[update.layer]):
            alive = "alive" if self._thread.is_alive() else "dead"
            _LOG.error(
                "layer %d: the update taken in iteration %d %s%s", update.layer, update.taken,
                f"failed: {update.error!r}" if ready else f"is not ready after {patience:g} s (updater {alive})",
                which(number),
            )  # fmt: skip
        return False

    def _patience(self) -> float:
        if self._overdue is not None and self._overdue.done.is_set():
            self._overdue = None
        return self._timeout_s if self._overdue is None and self._thread.is_alive() else 0.0

    def stop(self) -> None:
        """End the thread after the update it works on; raises if it does not end within the timeout."""
        if not self._thread.is_alive():
            return
        self._stopping = True
        self._tasks.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise BalancerError(
                "E138", "the updater did not end", why=f"still running {self._timeout_s} s after it was told to stop",
                hint="raise balancer.update_timeout_s, or look what holds it with py-spy",
            )  # fmt: skip

    def _serve(self) -> None:
        self._enter()
        while (update := self._tasks.get()) is not None:
            try:
                if not self._stopping and update.agreed is not False:
                    self._prepare(update)
            except Exception as error:  # reported by whoever waits: the model must go on with the last good placement
                update.error = error
            except BaseException as error:  # the thread is to end; whoever waits learns of the error and the death
                update.error = error
                return
            finally:
                update.finish()
            del update  # while it waits for the next one, its staged weights must not stay alive

    def _prepare(self, update: Update) -> None:
        if not update.begin():
            return
        token = self._sink.begin(Kind.PLAN, update.layer, update.taken, UPDATER)
        changed = digest = None
        try:
            made = update.plan = self._planner_of(update)(update.load, update.current)
            changed, digest = len(made.changed), made.placement.digest()
        finally:
            self._sink.end(token, a=changed, b=digest)
        self._stage(update, made)

    def _planner_of(self, update: Update) -> Planner:
        """The layer's, which may remember the loads since the last `forget`."""
        generation, planner = self._planners.get(update.layer, (-1, None))
        if planner is None or generation != update.generation:
            planner = self._planning.planner()
            self._planners[update.layer] = update.generation, planner
        return planner

    def _stage(self, update: Update, made: Plan) -> None:
        token = self._sink.begin(Kind.STAGE_WEIGHTS, update.layer, update.taken, UPDATER)
        size = tensors = None
        try:
            update.staged = update.stage(made)
            size, tensors = update.staged.bytes, len(update.staged.tensors)
        finally:
            self._sink.end(token, a=size, b=tensors)
