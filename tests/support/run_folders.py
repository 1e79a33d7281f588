"""Synthetic run folders: a good run in miniature, which a test damages in one respect before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_eplb.core.events import HOST, RECORD, UPDATER, Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan, plan
from moe_eplb.recording.export import write_trace
from moe_eplb.recording.log_format import HEADER_BYTES, Clock, LogHeader

RANKS, LAYERS, EXPERTS, TOP_K, SLOTS, TOKENS, ITERATIONS = 2, 2, 4, 2, 6, 6, 4
PER_RANK = SLOTS // RANKS
HIDDEN = 4
SLOT_BYTES = 3 * HIDDEN * HIDDEN * 4
DECAY = 0.95
BALANCER_STREAM = 4
FLAGS = 7
UPDATES = ((0, 0, 1), (1, 1, 2), (0, 2, 3))
"""(layer, taken, due) of the updates that commit within the run."""
LAYER_NS, STEP_NS = 1_000, 3_000
CLOCK = Clock(1_000, 1_700_000_000_000_000_000)

RowDict = dict[str, Any]
Record = dict[str, int]

# (kind, stream, start, end) within a layer's time: the host's calls, then the work that they put on streams.
_HOST_CALLS = (
    (Kind.START_WAIT_GPU_STAGE, 0, 50),
    (Kind.DONE_WAIT_GPU_STAGE, 60, 70),
    (Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, 100, 120),
    (Kind.ROUTE, 130, 160),
    (Kind.START_SET_CPU_STAGE, 600, 610),
    (Kind.DONE_SET_CPU_STAGE, 760, 800),
)
_DEVICE_WORK = (
    (Kind.START_WAIT_GPU_STAGE, BALANCER_STREAM, 20, 80),
    (Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, BALANCER_STREAM, 120, 200),
    (Kind.STATISTIC_REDUCE, BALANCER_STREAM, 200, 300),
    (Kind.LOAD_UPDATE, BALANCER_STREAM, 300, 320),
    (Kind.START_SET_CPU_STAGE, BALANCER_STREAM, 610, 700),
    (Kind.TOPK, 0, 70, 100),
    (Kind.ROUTE, 0, 135, 155),
    (Kind.DISPATCH, 0, 160, 260),
    (Kind.EXPERTS, 0, 300, 600),
    (Kind.COMBINE, 0, 650, 750),
)


@dataclass
class RunBuilder:
    """What is going to be written: change anything, then `write`."""

    scenario: dict[str, Any]
    rows: list[RowDict] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=lambda: {"tool": "moe_eplb", "state": "finished", "failure": ""})
    dropped: dict[int, int] = field(default_factory=dict)
    not_closed: set[int] = field(default_factory=set)

    def add(self, row: str, rank: int, layer: int = -1, iteration: int = -1, **fields: Any) -> None:
        self.rows.append({"row": row, "rank": rank, "layer": layer, "iteration": iteration, **fields})

    def find(self, row: str, **fields: Any) -> list[RowDict]:
        """Evidence rows with these fields."""
        wanted = {"row": row, **fields}
        return [r for r in self.rows if all(r.get(name) == value for name, value in wanted.items())]

    def remove(self, row: str, **fields: Any) -> None:
        """Take evidence rows away; there must be some."""
        gone = self.find(row, **fields)
        assert gone
        self.rows = [r for r in self.rows if not any(r is g for g in gone)]

    def find_records(self, kind: Kind, *, host: bool, **fields: int) -> list[Record]:
        """Log records of a kind, the host's or the device's, with these fields."""
        wanted = {"kind": int(kind), **fields}
        of_kind = [r for r in self.records if all(r[name] == value for name, value in wanted.items())]
        return [r for r in of_kind if (r["stream"] == HOST) is host]

    def write(self, folder: Path) -> Path:
        """Write the run folder with its trace."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scenario.yaml").write_text(yaml.safe_dump(self.scenario, sort_keys=False), encoding="utf-8")
        (folder / "meta.json").write_text(json.dumps(self.meta), encoding="utf-8")
        for rank in range(self.scenario["ranks"]):
            mine = [json.dumps(row) + "\n" for row in self.rows if row["rank"] == rank]
            (folder / f"evidence.rank{rank}.jsonl").write_text("".join(mine), encoding="utf-8")
            self._write_log(folder / f"events.rank{rank}.bin", rank)
        write_trace(folder)
        return folder

    def _write_log(self, path: Path, rank: int) -> None:
        mine = sorted((r for r in self.records if r["rank"] == rank), key=lambda r: (r["start"], -r["end"]))
        columns = [name for name in RECORD.names or () if name != "thread"]
        rows = np.zeros(len(mine), RECORD)
        for name in columns:
            rows[name] = [record[name] for record in mine]
        rows["thread"] = [2 if record["stream"] == UPDATER else 1 for record in mine]
        closed = rank not in self.not_closed
        header = LogHeader(rank, len(mine), CLOCK, self.dropped.get(rank, 0), 700_000 if closed else -1, 1, closed)
        path.write_bytes(header.pack().ljust(HEADER_BYTES, b"\0") + rows.tobytes())


def scenario(**changes: Any) -> dict[str, Any]:
    """The miniature's scenario as a plain dictionary."""
    return {
        "name": "miniature",
        "ranks": RANKS,
        "iterations": ITERATIONS,
        "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "intermediate": HIDDEN},
        "dispatch": "allgather",
        "workload": {"kind": "model", "tokens_per_rank": TOKENS},
        "balancer": {"slots_per_rank": PER_RANK, "layer_updates_per_iter": 1, "empty_group": "never"},
    } | changes


def good_run(**changes: Any) -> RunBuilder:
    """A run of four iterations in which three of the updates commit."""
    run = RunBuilder(scenario(**changes))
    for rank in range(RANKS):
        run.add("begin", rank, pid=1, ranks=RANKS, layers=LAYERS, experts=EXPERTS, slots=SLOTS, top_k=TOP_K)
        run.rows[-1] |= {"dynamic": True, "off": ""}
        for layer in range(LAYERS):
            run.add("attest", rank, layer, -1, slots=PER_RANK, mismatched=[], changed_bytes=PER_RANK)
    placements = [_placement(np.arange(SLOTS) % EXPERTS) for _ in range(LAYERS)]
    loads = [np.zeros(EXPERTS, dtype=np.float32) for _ in range(LAYERS)]
    plans: dict[tuple[int, int], Plan] = {}
    for iteration in range(ITERATIONS):
        _iteration_records(run, iteration)
        for layer in range(LAYERS):
            if (layer, iteration) in plans:
                placements[layer] = _commit(run, layer, iteration, plans[layer, iteration])
            changed = iteration == 0 or (layer, iteration) in plans
            _layer_rows(run, layer, iteration, placements[layer].slot_to_expert, write_slots=changed)
            loads[layer] = loads[layer] * np.float32(DECAY) + _counts(layer, iteration).sum(0).astype(np.float32)
            if (layer, iteration, iteration + 1) in UPDATES:
                plans[layer, iteration + 1] = plan(loads[layer].astype(np.float64), placements[layer])
                loads[layer] = np.zeros(EXPERTS, dtype=np.float32)
    for rank in range(RANKS):
        for layer in range(LAYERS):
            run.add("attest", rank, layer, ITERATIONS - 1, slots=PER_RANK, mismatched=[], changed_bytes=0)
        run.add("leak", rank, threads=[], segments=[], pending=0, balancer=False)
        run.add("end", rank, iterations=ITERATIONS, seconds=1.0, peak_rss_bytes=1)
    return run


def scripted_run(
    calls: list[Any], errors: Iterable[RowDict | None], kinds: Iterable[Kind], **changes: Any
) -> RunBuilder:
    """A run of scripted calls on one rank: what each call raised, and the host's records of them."""
    balancer = {"slots_per_rank": EXPERTS, "layer_updates_per_iter": 1}
    run = RunBuilder(scenario(ranks=1, iterations=1, calls=calls, balancer=balancer, **changes))
    run.add("begin", 0, pid=1, ranks=1, layers=LAYERS, experts=EXPERTS, slots=EXPERTS, top_k=TOP_K)
    run.rows[-1] |= {"dynamic": True, "off": ""}
    for index, error in enumerate(errors):
        name = calls[index] if isinstance(calls[index], str) else next(iter(calls[index]))
        run.add("call", 0, 0, 0, index=index, call=name, error=error)
    for index, kind in enumerate(kinds):
        layer = -1 if kind >= Kind.START_ITER else 0
        start = 2_000 + 100 * index
        _record(run, 0, kind, HOST, layer, 0, start, start if layer < 0 else start + 50, a=FLAGS)
    run.add("leak", 0, threads=[], segments=[], pending=0, balancer=False)
    run.add("end", 0, iterations=0, seconds=1.0, peak_rss_bytes=1)
    return run


def digest(slots: np.ndarray) -> int:
    """Digest of a placement of the miniature."""
    return _placement(slots).digest()


def _placement(slots: np.ndarray) -> Placement:
    return Placement(ranks=RANKS, experts=EXPERTS, slot_to_expert=slots.astype(np.int32))


def for_all(rows: Iterable[RowDict], change: Callable[[RowDict], Any]) -> None:
    """Change rows in place; there must be some."""
    rows = list(rows)
    assert rows
    for row in rows:
        change(row)


def _record(
    run: RunBuilder, rank: int, kind: Kind, stream: int, layer: int, iteration: int, start: int, end: int, a: int = 0
) -> None:
    run.records.append(
        {"rank": rank, "kind": int(kind), "stream": stream, "layer": layer, "iteration": iteration}
        | {"start": start, "end": end, "a": a, "b": 0}
    )


def _iteration_records(run: RunBuilder, iteration: int) -> None:
    base = 2_000 + iteration * STEP_NS
    for rank in range(RANKS):
        _record(run, rank, Kind.START_ITER, HOST, -1, iteration, base, base, a=3)
        _record(run, rank, Kind.STEP, HOST, -1, iteration, base + 1, base + 2_001 + rank)
        for layer in range(LAYERS):
            begin = base + 100 + layer * LAYER_NS
            for kind, start, end in _HOST_CALLS:
                _record(run, rank, kind, HOST, layer, iteration, begin + start, begin + end, a=FLAGS)
            for kind, stream, start, end in _DEVICE_WORK:
                _record(run, rank, kind, stream, layer, iteration, begin + start, begin + end)
        end = base + STEP_NS - 100
        _record(run, rank, Kind.END_ITER, HOST, -1, iteration, end, end)


def _commit(run: RunBuilder, layer: int, iteration: int, made: Plan) -> Placement:
    """Commit the plan of an update that was taken in the iteration before."""
    changed = made.changed.tolist()
    begin = 2_000 + iteration * STEP_NS + 100 + layer * LAYER_NS
    for rank in range(RANKS):
        local = [slot - rank * PER_RANK for slot in changed if slot // PER_RANK == rank]
        fields = {"taken": iteration - 1, "digest": made.placement.digest(), "changed": changed}
        fields["bytes"] = len(local) * SLOT_BYTES
        plan = fields | {"predicted": made.predicted.tolist(), "stall_us": 0, "awaited_us": 0}
        run.add("plan", rank, layer, iteration - 1, due=iteration, **plan)
        sources = {"host": len(local) * SLOT_BYTES}
        run.add("commit", rank, layer, iteration, local_changed=local, sources=sources, **fields)
        run.add("attest", rank, layer, iteration, slots=PER_RANK, mismatched=[], changed_bytes=len(local))
        _record(run, rank, Kind.STAGE_WEIGHTS, UPDATER, layer, iteration - 1, begin - LAYER_NS, begin - 500)
        _record(run, rank, Kind.COMMIT, BALANCER_STREAM, layer, iteration, begin + 30, begin + 70)
    return made.placement


def _counts(layer: int, iteration: int) -> np.ndarray:
    """Routed entries by rank and expert; who is hot changes with every iteration, so that every plan moves experts."""
    shares = np.roll([0.55, 0.25, 0.15, 0.05], layer + iteration)
    return np.random.default_rng((layer, iteration)).multinomial(TOKENS * TOP_K, shares, size=RANKS)


def _layer_rows(run: RunBuilder, layer: int, iteration: int, slots: np.ndarray, *, write_slots: bool) -> None:
    counts = _counts(layer, iteration)
    expected = np.stack([_spread(row, slots) for row in counts])
    total = counts.sum(0)
    replicas = np.bincount(slots, minlength=EXPERTS)
    loads = (total[slots] / replicas[slots]).reshape(RANKS, PER_RANK).sum(1)
    for rank in range(RANKS):
        mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        entries = TOKENS * TOP_K
        faults = dict.fromkeys(("missing", "duplicated", "wrong_expert", "invalid_slot"), 0)
        placement = {"digest": digest(slots)} | ({"slots": slots.tolist()} if write_slots else {})
        run.add("routed", rank, layer, iteration, counts=counts[rank].tolist())
        run.add("expected", rank, layer, iteration, slots=expected[rank].tolist())
        run.add("placement", rank, layer, iteration, **placement)
        run.add("reduced", rank, layer, iteration, counts=total.tolist())
        run.add("balance", rank, layer, iteration, value=float(loads.mean() / loads.max()))
        run.add(
            "equality",
            rank,
            layer,
            iteration,
            max_abs=1e-7,
            max_ref=1.0,
            ratio=1e-7,
            tolerance=1e-5,
            tokens=TOKENS,
            misrouted=0,
        )
        run.add("received", rank, layer, iteration, slots=expected.sum(0)[mine].tolist())
        run.add("dispatch", rank, layer, iteration, expected=entries, once=entries, first="", **faults)


def _spread(counts: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Entries per slot if the replicas of each expert take turns."""
    spread = np.zeros(SLOTS, dtype=np.int64)
    for expert, count in enumerate(counts):
        replicas = np.flatnonzero(slots == expert)
        for turn in range(count):
            spread[replicas[turn % len(replicas)]] += 1
    return spread
