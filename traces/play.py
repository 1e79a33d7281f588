"""What a rank does, step by step: host ranges, calls of the runtime, waits between streams, and GPU work.

GPU work starts when it was launched, the work before it on its stream has ended, and what its stream waits for is done.
All times are whole microseconds in ns, so that every format can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moe_eplb.core.events import STREAMS, Kind

__all__ = ["LAYERS", "MAIN", "PATHS", "Api", "Played", "Range", "Step", "Wait", "Work", "play"]

MAIN, BALANCER = STREAMS.index("Main"), STREAMS.index("MoeBalancer")
US = 1_000
LAYERS = 2
PATHS = {
    "A": (
        Kind.UPDATE_LOCAL_STATISTIC,
        Kind.GET_LOCAL_STATISTIC_TENSOR,
        Kind.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC,
    ),
    "B": (Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS,),
    "C": (Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS,),
}
_COUNTS = (PATHS["A"][0], *PATHS["B"], *PATHS["C"])
_JOINS_BALANCER = (Kind.START_WAIT_GPU_STAGE, *_COUNTS, PATHS["A"][2], Kind.START_SET_CPU_STAGE)
_JOINS_MAIN = (Kind.DONE_WAIT_GPU_STAGE, Kind.GET_LOCAL_STATISTIC_TENSOR, Kind.DONE_SET_CPU_STAGE)
_US_OF = {
    Kind.START_WAIT_GPU_STAGE: 8, Kind.TOPK: 6, Kind.ROUTE: 4, Kind.DISPATCH: 30, Kind.EXPERTS: 40, Kind.COMBINE: 30,
    Kind.STATISTIC_REDUCE: 30, Kind.PREPARE: 30,
}  # fmt: skip
_OTHER_US = 5


@dataclass(frozen=True)
class Step:
    """A call, or a piece of work that is none.

    Attributes:
        flags: 1 first, 2 last, 4 dynamic.
        works: Whether it does anything on the device; a call that is planted does not.
        said: Whether anything tells of it; what is left out still does its work.
        waits: Whether its wait between the streams is recorded.
        holds: Whether the wait holds its stream back.
        closes: Whether its range ends in the trace.
    """

    kind: Kind
    layer: int = -1
    iteration: int = -1
    flags: int = 7
    works: bool = True
    said: bool = True
    waits: bool = True
    holds: bool = True
    closes: bool = True
    extra: str = ""
    """Name of a kernel more that it launches."""
    lasts_us: int = 0
    captured: bool = False
    """What it launches becomes nodes of the graph and does not run."""
    replays: bool = False
    """It is no call: it launches the graph."""


@dataclass(frozen=True)
class Range:
    """A host range; `inner` is that of the work that a call puts on a stream."""

    step: Step
    start: int
    end: int
    inner: bool = False


@dataclass(frozen=True)
class Api:
    """A call of the runtime."""

    name: str
    start: int
    end: int
    correlation: int


@dataclass(frozen=True)
class Wait:
    """A stream waits for what another one had been given when the event was recorded."""

    stream: int
    on: int
    recorded: int
    waited: int


@dataclass(frozen=True)
class Work:
    """GPU work of a kind; `name` if it is not named after it."""

    kind: Kind
    layer: int
    iteration: int
    stream: int
    start: int
    end: int
    correlation: int
    name: str = ""
    node: int = 0


@dataclass
class Played:
    """What one rank did."""

    rank: int
    ranges: list[Range] = field(default_factory=list)
    api: list[Api] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    nodes: list[Work] = field(default_factory=list)
    """The graph, as it was captured."""


def play(rank: int, steps: list[Step], shift_us: int) -> Played:
    """Do a rank's steps, by a clock that is off by `shift_us`."""
    return _Player(rank, shift_us).play(steps)


class _Player:
    """The clock of a host thread and of its streams."""

    def __init__(self, rank: int, shift_us: int) -> None:
        self.played = Played(rank)
        self._now = (1_000 + rank + shift_us) * US
        self._free = {MAIN: self._now, BALANCER: self._now}
        self._correlation = 0

    def play(self, steps: list[Step]) -> Played:
        for step in steps:
            begun = self._now
            self._now += US
            if step.kind <= Kind.ABORT_ITER and step.kind >= Kind.START_ITER:
                self._note(step, begun, begun)
                continue
            if step.replays:
                self._replay(step)
                continue
            if step.captured and not self.played.nodes:
                self._api("cudaStreamBeginCapture")
            if step.works:
                self._do(step)
            self._note(step, begun, self._now)
            if step.captured and (step.kind, step.layer) == (Kind.DONE_SET_CPU_STAGE, LAYERS - 1):
                self._api("cudaStreamEndCapture")
            self._now += US
            if step.kind is Kind.DONE_SET_CPU_STAGE and step.works:
                self._now = max(self._now, self._free[MAIN])  # the host keeps step with its device
        return self.played

    def _note(self, step: Step, start: int, end: int, *, inner: bool = False) -> None:
        if step.said:
            self.played.ranges.append(Range(step, start, end, inner))

    def _do(self, step: Step) -> None:
        if step.kind in _JOINS_BALANCER:
            self._wait(step, BALANCER, MAIN)
        if step.kind in _JOINS_MAIN:
            self._wait(step, MAIN, BALANCER)
            return
        if step.kind is PATHS["A"][2]:
            self._launch(replace(step, kind=Kind.LOAD_UPDATE), BALANCER)
            return
        self._launch(step, BALANCER if step.kind in _JOINS_BALANCER else MAIN)
        if step.kind in (*PATHS["B"], *PATHS["C"]):
            reduces = (Kind.STATISTIC_REDUCE,) if step.kind in PATHS["B"] else ()
            for kind in (*reduces, Kind.LOAD_UPDATE):
                self._launch(replace(step, kind=kind), BALANCER)

    def _launch(self, step: Step, stream: int) -> None:
        begun = self._now
        self._now += US
        for name in ("", *([step.extra] if step.extra else [])):
            launched = self._api("cudaLaunchKernel")
            if step.captured:
                at = self.played.api[-1].start
                number = len(self.played.nodes) + 1
                node = Work(step.kind, step.layer, step.iteration, stream, at, at, launched, name, number)
                self.played.nodes.append(node)
                continue
            start = max(self._now + 2 * US, self._free[stream])
            self._free[stream] = start + (step.lasts_us or _US_OF.get(step.kind, _OTHER_US)) * US
            self.played.work.append(
                Work(step.kind, step.layer, step.iteration, stream, start, self._free[stream], launched, name)
            )
        self._note(step, begun, self._now, inner=True)
        self._now += US

    def _wait(self, step: Step, stream: int, on: int) -> None:
        if step.captured:
            return
        recorded = self._api("cudaEventRecord")
        waited = self._api("cudaStreamWaitEvent")
        if step.waits:
            self.played.waits.append(Wait(stream, on, recorded, waited))
        if step.holds:
            self._free[stream] = max(self._free[stream], self._free[on])

    def _replay(self, step: Step) -> None:
        """The whole graph, one node after the other."""
        launched = self._api("cudaGraphLaunch")
        at = max(self._now, *self._free.values())
        for node in self.played.nodes:
            end = at + _US_OF.get(node.kind, _OTHER_US) * US
            self.played.work.append(replace(node, start=at, end=end, correlation=launched, iteration=step.iteration))
            at = end + US
        self._free = dict.fromkeys(self._free, at)
        self._now = at

    def _api(self, name: str) -> int:
        self._correlation += 1
        self.played.api.append(Api(name, self._now, self._now + US, self._correlation))
        self._now += 2 * US
        return self._correlation
