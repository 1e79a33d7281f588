"""A synthetic run folder of replayed graphs: the first iteration eager, then a capture, then a replay an iteration."""

from __future__ import annotations

from moe_eplb.core.events import CAPTURED, HOST, Kind
from tests.support.run_folders import (
    BALANCER_STREAM,
    ITERATIONS,
    LAYER_NS,
    LAYERS,
    PER_RANK,
    RANKS,
    STEP_NS,
    Record,
    RunBuilder,
    for_all,
    good_run,
)

REPLAYED = range(1, ITERATIONS)
STAGES = ("take over", "vote", "fold", "hand over")


def graph_run() -> RunBuilder:
    """The miniature's run with `execution: graph`."""
    model = good_run().scenario["model"] | {"dtype": "bfloat16", "hidden": 8, "intermediate": 8}
    balancer = {"slots_per_rank": PER_RANK, "layer_updates_per_iter": 1, "empty_group": "never", "state": "device"}
    run = good_run(device="cuda", execution="graph", model=model, balancer=balancer)
    for name in ("plan", "commit"):
        for_all(run.find(name), lambda row: row.update(bytes=2 * row["bytes"]))
    for_all(run.find("commit"), lambda row: row.update(sources={"host": row["bytes"]}))
    eager = [r for r in run.records if _is_stage_call(r) and r["iteration"] == 0]
    run.records = [r for r in run.records if not (_is_stage_call(r) and r["iteration"] in REPLAYED)]
    gap = 2_000 + STEP_NS - 100  # the end of iteration 0; what comes later is shifted to make room for the capture
    for record in run.records:
        if record["start"] > gap:
            record["start"] += STEP_NS
            record["end"] += STEP_NS
    run.records += [
        record | {"iteration": CAPTURED, "start": record["start"] + STEP_NS, "end": record["end"] + STEP_NS}
        for record in eager
    ]
    for rank in range(RANKS):
        run.records.append(host(Kind.CAPTURE, rank, CAPTURED, gap + 1, 2_000 + 2 * STEP_NS - 50))
        for iteration in REPLAYED:
            run.records += _replay(rank, iteration)
    return run


def host(
    kind: Kind, rank: int, iteration: int, start: int, end: int | None = None, *, layer: int = -1, a: int = 0
) -> Record:
    """A record of the host's: a mark without an end."""
    return {"rank": rank, "kind": int(kind), "stream": HOST, "layer": layer, "iteration": iteration} | {
        "start": start, "end": start if end is None else end, "a": a, "b": 0,
    }  # fmt: skip


def _is_stage_call(record: Record) -> bool:
    return record["stream"] == HOST and record["kind"] <= Kind.DONE_SET_CPU_STAGE


def _replay(rank: int, iteration: int) -> list[Record]:
    """The call that replays, and what the device wrote down."""
    begin = 2_000 + (iteration + 1) * STEP_NS
    made = [host(Kind.REPLAY, rank, iteration, begin + 50)]
    settled = begin + 100 + LAYERS * LAYER_NS
    made += [
        host(Kind.DEVICE_STAGE, rank, iteration, settled + stage, layer=layer, a=stage)
        for layer in range(LAYERS)
        for stage in range(len(STAGES))
    ]
    vote = {"kind": int(Kind.VOTE), "stream": BALANCER_STREAM, "rank": rank, "iteration": iteration, "a": 0, "b": -1}
    return made + [
        vote | {"layer": layer, "start": begin + 300 + layer * LAYER_NS, "end": begin + 302 + layer * LAYER_NS}
        for layer in range(LAYERS)
    ]
