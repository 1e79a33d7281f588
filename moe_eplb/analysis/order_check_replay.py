"""The calls of every rank through the protocol, and the first illegal one with what was around it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.conformance import DYNAMIC, NEIGHBOURS, Machine
from moe_eplb.analysis.order_check_calls import Found, OwnGraphs
from moe_eplb.analysis.order_check_flags import infer_flags
from moe_eplb.analysis.ranges import RangeIndex
from moe_eplb.core.events import CAPTURED, KINDS, Kind
from moe_eplb.core.protocol import Illegal, violation

__all__ = ["IllegalCall", "Neighbour", "Replayed", "replay_calls"]

_GRAPH_LAUNCH = "GraphLaunch"
_THREAD = (1 << 24) - 1
"""The bits of a thread in the numbers that Nsight Systems gives threads."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A call with its place: time in ns, thread, and the streams that its work went to."""

    name: str
    layer: int
    iteration: int
    start: int
    thread: int
    streams: tuple[str, ...]

    def __str__(self) -> str:
        layer = f" layer {self.layer}" if self.layer >= 0 else ""
        iteration = f" iteration {self.iteration}" if self.iteration >= 0 else ""
        streams = f" on {', '.join(self.streams)}" if self.streams else ""
        thread = self.thread & _THREAD if self.thread >> 32 else self.thread
        return f"{self.start} ns thread {thread} {self.name}{layer}{iteration}{streams}"


@dataclass(frozen=True, slots=True)
class IllegalCall:
    """The first illegal call of a rank. `path`: the ranges around it, outermost first."""

    rank: int
    code: str
    what: str
    why: str
    hint: str
    call: Neighbour
    before: tuple[Neighbour, ...]
    after: tuple[Neighbour, ...]
    path: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"rank {self.rank}: {self.code} {self.what} ({self.why})"]
        lines += [f"    {one}" for one in self.before] + [f"  > {self.call}"] + [f"    {one}" for one in self.after]
        return "\n".join([*lines, *([f"  in {' > '.join(self.path)}"] if self.path else [])])


@dataclass
class Replayed:
    """Outcome for all ranks.

    Attributes:
        illegal: The first illegal call of each rank that has one.
        holes: What is missing of a rank's calls, in words.
        flags: Flags of each call.
        flags_inferred: They are not in the trace.
        by_graph_of: Replays by rank that stand for an iteration's stage calls, which were made at the capture.
        unordered: Ranks on which no iteration is seen, so that nothing of their order is.
    """

    flags: NDArray[np.int64]
    flags_inferred: bool
    illegal: list[IllegalCall] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    by_graph_of: dict[int, int] = field(default_factory=dict)
    unordered: list[int] = field(default_factory=list)


def replay_calls(capture: Capture, found: Found, *, ours: bool) -> Replayed:
    """Replay the calls rank by rank, those of captures by themselves; a replay ends at its first violation.

    Args:
        ours: It is our own trace: it begins with the program, and what is in its middle is not lost.
    """
    calls, graphs = found.calls, found.graphs
    flags, inferred = infer_flags(calls)
    outcome = Replayed(flags, inferred)
    layers = _dynamic_layers(calls, flags) or _dynamic_layers(
        graphs.captured, graphs.captured["flags"].astype(np.int64)
    )
    launches = _graph_launches(capture)
    for rank in np.unique(calls["rank"]).tolist():
        launched = launches.get(rank, np.empty(0, np.int64))
        made, made_flags = _with_replays(calls, flags, graphs, rank)
        _Rank(capture, made, made_flags, layers, launched, ours=ours).replay(outcome)
        captured = graphs.captured[graphs.captured["rank"] == rank]
        if len(captured):
            _Rank(capture, captured, _captured_flags(captured, layers), layers, launched, ours=ours).capture(outcome)
    return outcome


def _with_replays(
    calls: Table, flags: NDArray[np.int64], graphs: OwnGraphs, rank: int
) -> tuple[Table, NDArray[np.int64]]:
    """A rank's calls and their flags, among them in order of time those that replay a graph."""
    mine, replays = calls["rank"] == rank, graphs.replays[graphs.replays["rank"] == rank]
    made = np.concatenate([calls[mine], replays])
    order = np.argsort(made["start"], kind="stable")
    return made[order], np.concatenate([flags[mine], np.zeros(len(replays), np.int64)])[order]


def _captured_flags(captured: Table, layers: dict[int, int]) -> NDArray[np.int64]:
    """Flags of the calls of captures; where they are not told, layers are dynamic that are so elsewhere."""
    flags, inferred = infer_flags(captured)
    return flags | DYNAMIC * np.isin(captured["layer"], list(layers)) if inferred else flags


def _dynamic_layers(calls: Table, flags: NDArray[np.int64]) -> dict[int, int]:
    """The place in order of each layer with dynamic routing that any rank has begun."""
    begins = (calls["kind"] == Kind.START_WAIT_GPU_STAGE) & (flags & DYNAMIC > 0)
    return {layer: place for place, layer in enumerate(np.unique(calls["layer"][begins]).tolist())}


def _graph_launches(capture: Capture) -> dict[int, NDArray[np.int64]]:
    """When each rank launched graphs, in order."""
    numbers = [number for number, name in enumerate(capture.names) if _GRAPH_LAUNCH in name]
    calls = capture.calls[np.isin(capture.calls["name"], numbers)]
    return {rank: np.sort(calls["start"][calls["rank"] == rank]) for rank in np.unique(calls["rank"]).tolist()}


class _Rank:
    """The calls of one rank."""

    def __init__(
        self, capture: Capture, calls: Table, flags: NDArray[np.int64], layers: dict[int, int],
        graphs: NDArray[np.int64], *, ours: bool,
    ) -> None:  # fmt: skip
        self._capture, self._calls, self._layers, self._graphs, self._ours = capture, calls, layers, graphs, ours
        columns = (calls[name].tolist() for name in ("kind", "layer", "iteration", "start"))
        self._rows = list(zip(*columns, flags.tolist(), strict=True))
        self._rank = int(calls["rank"][0])
        self._begun = 0

    def replay(self, outcome: Replayed) -> None:
        """Make the calls until one is illegal, and note what is missing of them."""
        starts = np.flatnonzero(self._calls["kind"] == Kind.START_ITER)
        if not len(starts):
            outcome.unordered.append(self._rank)
        first = int(starts[0]) if len(starts) and not self._ours else 0
        if first:
            outcome.holes.append(f"rank {self._rank}: calls before the first iteration begins: {first}")
        next_iteration = 0 if self._ours or not len(starts) else self._rows[first][2]
        machine, places = Machine(len(self._layers), max(next_iteration, 0)), self._layers
        for index, (kind, layer, iteration, start, flags) in enumerate(self._rows[first:], first):
            try:
                if kind < Kind.START_ITER:
                    machine.call(kind, places.get(layer, layer), iteration, flags)
                else:
                    machine = self._iteration_call(machine, kind, iteration, start, outcome)
            except Illegal as illegal:
                outcome.illegal.append(self._illegal(index, illegal))
                return
        self._end(machine, outcome)

    def capture(self, outcome: Replayed) -> None:
        """Make the calls of captures, each of which has every layer."""
        machine, made = Machine(len(self._layers)), 0
        try:
            for kind, layer, iteration, _, flags in self._rows:
                machine.call(kind, self._layers.get(layer, layer), iteration, flags)
                made += 1
            if machine.iterations.in_iter:
                machine.call(Kind.END_ITER, c.UNKNOWN, CAPTURED, 0)
        except Illegal as illegal:
            outcome.illegal.append(self._illegal(min(made, len(self._rows) - 1), illegal))

    def _iteration_call(self, machine: Machine, kind: int, iteration: int, start: int, outcome: Replayed) -> Machine:
        replays = False
        if kind == Kind.START_ITER:
            self._begun = start
            machine = self._over_hole(machine, iteration, outcome)
        elif kind == Kind.REPLAY:
            outcome.by_graph_of[self._rank] = outcome.by_graph_of.get(self._rank, 0) + 1
        elif kind == Kind.END_ITER and machine.iterations.layers_run == 0:
            first, beyond = np.searchsorted(self._graphs, (self._begun, start))
            replays = bool(beyond > first)
            outcome.by_graph_of[self._rank] = outcome.by_graph_of.get(self._rank, 0) + replays
        machine.call(kind, c.UNKNOWN, iteration, 0, replays=replays)
        return machine

    def _over_hole(self, machine: Machine, iteration: int, outcome: Replayed) -> Machine:
        """A trace that may lack something in its middle goes on after the hole."""
        state = machine.iterations
        due = state.next_iteration + state.in_iter
        if self._ours or iteration <= due:
            return machine
        lost = f"{due}" if iteration == due + 1 else f"{due} to {iteration - 1}"
        outcome.holes.append(f"rank {self._rank}: iteration {lost} is not in the trace")
        return Machine(len(self._layers), iteration)

    def _end(self, machine: Machine, outcome: Replayed) -> None:
        if machine.iterations.in_iter:
            left = "".join(f", layer {self._name_of(layer)} was not handed over" for layer in machine.unfinished)
            iteration = machine.iterations.next_iteration
            outcome.holes.append(f"rank {self._rank}: iteration {iteration} does not end in the trace{left}")
        elif machine.unfinished:
            layers = ", ".join(str(self._name_of(layer)) for layer in machine.unfinished)
            outcome.holes.append(f"rank {self._rank}: not handed over before the trace ends: layer {layers}")

    def _name_of(self, place: int) -> int:
        return next((layer for layer, number in self._layers.items() if number == place), place)

    def _illegal(self, index: int, illegal: Illegal) -> IllegalCall:
        _, layer, iteration, _, _ = self._rows[index]
        error = violation(layer, iteration, illegal)
        before = range(max(0, index - NEIGHBOURS), index)
        after = range(index + 1, min(len(self._rows), index + 1 + NEIGHBOURS))
        return IllegalCall(
            self._rank, error.code, error.what, error.why, error.hint, self._neighbour(index),
            tuple(map(self._neighbour, before)), tuple(map(self._neighbour, after)), self._path(index),
        )  # fmt: skip

    def _neighbour(self, index: int) -> Neighbour:
        call = self._calls[index]
        kind, layer, iteration, start, _ = self._rows[index]
        return Neighbour(KINDS[Kind(kind)].name, layer, iteration, start, int(call["thread"]), self._streams(call))

    def _streams(self, call: np.void) -> tuple[str, ...]:
        """Streams of what was launched while the call lasted; in our own trace of what the call is named after."""
        api, gpu = self._capture.calls, self._capture.gpu
        if self._ours:
            name = KINDS[Kind(int(call["kind"]))].name
            number = self._capture.names.index(name) if name in self._capture.names else c.UNKNOWN
            mine = gpu[(gpu["rank"] == self._rank) & (gpu["name"] == number)]
            return self._named(mine[(mine["layer"] == call["layer"]) & (mine["iteration"] == call["iteration"])])
        inside = api[(api["process"] == call["process"]) & (api["thread"] == call["thread"])]
        closed = call["end"] != c.UNKNOWN
        inside = inside[closed & (inside["start"] >= call["start"]) & (inside["start"] <= call["end"])]
        mine = gpu[(gpu["process"] == call["process"]) & np.isin(gpu["correlation"], inside["correlation"])]
        return self._named(mine)

    def _named(self, events: Table) -> tuple[str, ...]:
        keys = np.unique(events[["device", "stream"]]).tolist()
        named = self._capture.streams
        return tuple(named.get((self._rank, device, stream), f"stream {stream}") for device, stream in keys)

    def _path(self, index: int) -> tuple[str, ...]:
        call, ranges = self._calls[index], self._capture.ranges
        rows = np.flatnonzero((ranges["process"] == call["process"]) & (ranges["kind"] != c.MARK))
        moment = np.array([call["start"]])
        found = RangeIndex(ranges[rows])
        inner = found.around(np.array([call["process"]]), moment, np.array([call["thread"]]))[0]
        if inner < 0:
            return ()
        return tuple(self._capture.names[ranges["text"][rows[row]]] for row in found.path(int(inner)))
