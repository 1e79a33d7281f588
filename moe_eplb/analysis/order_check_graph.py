"""The order in replays of a graph, in which no call is made: the evidence is what stands for the calls.

Four things together would show it: the stage calls when the graph was captured are legal, the graph has nodes and
edges for them, the device wrote down each stage of each replay, and there are as many replays as iterations.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.order_check_calls import Found, OwnGraphs
from moe_eplb.analysis.order_check_replay import Replayed
from moe_eplb.analysis.ranges import Launches, RangeIndex
from moe_eplb.core.events import DEVICE_STAGES, KINDS, Kind
from moe_eplb.core.verdict import CheckResult

__all__ = ["graph_order", "has_graphs", "own_graph_order"]

_STAGES = {
    Kind.DONE_WAIT_GPU_STAGE: Kind.START_WAIT_GPU_STAGE, Kind.DONE_SET_CPU_STAGE: Kind.START_SET_CPU_STAGE,
}  # fmt: skip
"""A stage's work may be captured when it begins or when it is joined."""


def has_graphs(capture: Capture) -> bool:
    """Whether anything in the capture was replayed from a graph."""
    return bool(len(capture.nodes) or (capture.gpu["graph_node"] >= 0).any())


def graph_order(capture: Capture, found: Found, replayed: Replayed) -> CheckResult:
    """Judge what there is of the evidence; what is not in the trace makes the answer unknown."""
    findings = Findings("graph_order", "calls at capture, nodes and edges, a record of each stage, as many replays")
    kinds = _captured_kinds(capture, found)
    mine = np.flatnonzero(kinds >= 0)
    if not len(mine):
        findings.missing("no node of a graph was captured in a call of the balancer")
        return findings.result(f"{int((capture.gpu['graph_node'] >= 0).sum())} events of graphs")
    replays = _Replays(capture, kinds, mine)
    if replayed.illegal:
        findings.missing("the calls are illegal, so that a graph of them shows nothing")
    replays.judge_stages(findings)
    replays.judge_count(found.calls, replayed, findings)
    findings.missing("the graph's edges are not in the trace, so that its nodes may wait for too little")
    if len(found.graphs.noted):
        _judge_notes(found.graphs, findings)
    else:
        findings.missing("the device's own record of each replayed stage is not in the trace")
    return findings.result(f"{len(replays.launches)} replays with {len(mine)} events of the balancer's calls")


def own_graph_order(capture: Capture, found: Found, replayed: Replayed) -> CheckResult:
    """The same of our own trace, which has no nodes but notes of the device itself."""
    findings = Findings("graph_order", "legal captures, each stage of each replay written down by the device")
    if replayed.illegal:
        findings.missing("the calls are illegal, so that a graph of them shows nothing")
    _judge_notes(found.graphs, findings)
    return findings.result(f"{len(found.graphs.replays)} replays")


def _judge_notes(graphs: OwnGraphs, findings: Findings) -> None:
    """The device wrote down every stage of each layer that was captured, in every replay."""
    begun = graphs.captured[graphs.captured["kind"] == Kind.START_WAIT_GPU_STAGE]
    noted = Counter(graphs.noted[["rank", "iteration", "layer"]].tolist())
    for rank, iteration in graphs.replays[["rank", "iteration"]].tolist():
        layers = np.unique(begun["layer"][begun["rank"] == rank]).tolist()
        if not layers:
            findings.missing("no capture was seen", f"rank {rank}")
        for layer in layers:
            if noted[rank, iteration, layer] != len(DEVICE_STAGES):
                what = f"the device wrote down {noted[rank, iteration, layer]} of {len(DEVICE_STAGES)} stages"
                findings.wrong(what, f"rank {rank}, layer {layer}, iteration {iteration}")


def _captured_kinds(capture: Capture, found: Found) -> NDArray[np.int64]:
    """Kind of each GPU event [N] of a replay by the call in which its node was captured, else UNKNOWN."""
    kinds = np.full(len(capture.gpu), c.UNKNOWN, np.int64)
    node = Launches(capture).node
    rows = np.flatnonzero(node >= 0)
    if not len(rows) or not len(found.work):
        return kinds
    made = capture.nodes[node[rows]]
    around = RangeIndex(capture.ranges[found.work["row"]]).around(made["process"], made["start"], made["thread"])
    kinds[rows] = np.where(around >= 0, found.work["kind"][around], c.UNKNOWN)
    for joined, begun in _STAGES.items():
        kinds[kinds == joined] = begun
    return kinds


class _Replays:
    """Launches of graphs that hold work of the balancer.

    Args:
        kinds: Kind of each GPU event.
        rows: The events of known kind.
    """

    def __init__(self, capture: Capture, kinds: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        self._gpu, self._kinds, self._rows = capture.gpu, kinds, rows
        gpu = self._gpu[rows]
        self.launches, self._group = distinct_rows([gpu["process"], gpu["correlation"]])
        self._rank = np.zeros(len(self.launches), np.int64)
        self._rank[self._group] = gpu["rank"]
        # Instances of one graph have the same nodes, and so the same first one.
        self._graph = np.full(len(self.launches), np.iinfo(np.int64).max)
        np.minimum.at(self._graph, self._group, gpu["graph_node"])

    def judge_stages(self, findings: Findings) -> None:
        """Every replay has the balancer's wait and its hand-over as often as the others of its graph."""
        _, graph = distinct_rows([self._rank, self._graph])
        for kind in _STAGES.values():
            counts = np.bincount(self._group[self._kinds[self._rows] == kind], minlength=len(self.launches))
            most = np.zeros(int(graph.max()) + 1, np.int64)
            np.maximum.at(most, graph, counts)
            for launch in np.flatnonzero(counts < most[graph]).tolist():
                row = self._rows[self._group == launch][0]
                where = f"rank {self._gpu['rank'][row]}, {self._gpu['start'][row]} ns"
                findings.wrong(f"a replay lacks {KINDS[kind].name}", where)

    def judge_count(self, calls: Table, replayed: Replayed, findings: Findings) -> None:
        """An execution for each iteration: a replay where no layer was called, or the first one after the capture."""
        layers = self._layers()
        for rank in np.unique(self._rank).tolist():
            mine = calls[calls["rank"] == rank]
            of_model = len(np.unique(mine["layer"][mine["kind"] == Kind.START_WAIT_GPU_STAGE]))
            if (layers[self._rank == rank] < of_model).any():
                findings.missing("graphs of parts of the model, whose replays cannot be counted", f"rank {rank}")
                continue
            replays, iterations = int((self._rank == rank).sum()), int((mine["kind"] == Kind.START_ITER).sum())
            without_calls = replayed.by_graph_of.get(rank, 0)
            if not without_calls <= replays <= iterations:
                what = f"{replays} replays for {iterations} iterations, {without_calls} of them without calls"
                findings.wrong(what, f"rank {rank}")

    def _layers(self) -> NDArray[np.int64]:
        """How many layers each launch has a part of."""
        pairs, _ = distinct_rows([self._group, self._gpu["layer"][self._rows]])
        return np.bincount(pairs[:, 0], minlength=len(self.launches))
