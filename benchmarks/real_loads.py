"""How close balancing online comes to planning with hindsight, on recorded expert choices of a real model.

Three runs of the same tokens are compared by balancedness (mean rank load / max rank load of a layer in an iteration):
`static`, whose placement never changes; `online`, with every layer updated in every iteration; and `offline`, the same
planner given each iteration's own counts, which nobody has before the iteration.

    python benchmarks/real_loads.py LOADS.npz [--iterations N]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from benchmarks.machine import machine
from moe_eplb.analysis import run_folder
from moe_eplb.analysis.balance import measured_loads, routed_counts
from moe_eplb.analysis.moves import layer_moves
from moe_eplb.analysis.run_folder import Place, RunFolder
from moe_eplb.core import recorded
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.evidence import Row
from moe_eplb.core.placement import Placement, balancedness
from moe_eplb.core.planner import place, replicate
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool

__all__ = ["Comparison", "Figures", "compare", "make_scenario", "run"]

RANKS, TOKENS_PER_RANK, SLOTS_PER_EXPERT = 4, 256, 1.25
RESULT = Path(__file__).parent / "results" / "real_loads_cpu.json"
SCENARIO = """\
name: {name}
ranks: {ranks}
iterations: {iterations}
timeout_s: 600
model: {{layers: {layers}, experts: {experts}, top_k: {top_k}}}
workload: {{kind: recorded, path: {path}, order: position, tokens_per_rank: {tokens}}}
balancer: {{num_slots: {slots}, layer_updates_per_iter: {updates}, empty_group: never, update_timeout_s: 20}}
"""


class Balance(NamedTuple):
    """Balancedness under the three ways of placing."""

    static: float
    online: float
    offline: float


@dataclass(frozen=True)
class Figures:
    """Token-weighted mean balancedness from the first commit on, and the share of slots that ended up changed.

    `slots_changed` compares slot by slot the first placement with the last; `replicas_changed` compares what each rank
    holds, in whatever slot.
    """

    static: float
    online: float
    offline: float
    slots_changed: float
    replicas_changed: float

    @property
    def ratio(self) -> float:
        """Online / offline."""
        return self.online / self.offline


@dataclass(frozen=True)
class Comparison:
    """`total` over all layers, `layers` one by one, and the mean over layers of each iteration."""

    total: Figures
    layers: list[Figures]
    iterations: dict[int, Balance]


def make_scenario(loads: Path, iterations: int | None = None, *, updated: bool) -> Scenario:
    """A scenario of the file's model; `updated`: every layer in every iteration, else none ever."""
    file = recorded.load(loads)
    if file.topk_ids is None:
        raise SystemExit(f"{loads} holds counts; a file with the experts of every token is needed")
    fitting = len(file.topk_ids) // (RANKS * TOKENS_PER_RANK)
    text = SCENARIO.format(
        name="online" if updated else "static", ranks=RANKS, iterations=iterations or fitting, layers=file.layers,
        experts=file.experts, top_k=file.top_k, path=json.dumps(str(loads.resolve())), tokens=TOKENS_PER_RANK,
        slots=round(file.experts * SLOTS_PER_EXPERT), updates=file.layers if updated else 0,
    )  # fmt: skip
    return scenarios.loads(text, loads.name)


def run(loads: Path, iterations: int | None, folder: Path) -> tuple[RunFolder, RunFolder]:
    """The static and the online run, made below `folder`; stops unless every check of both is valid."""
    with RankPool() as pool:
        for name in ("static", "online"):
            scenario = make_scenario(loads, iterations, updated=name == "online")
            verdict = pool.run(scenario, folder / name).verdict
            if verdict.failure or verdict.status is not Status.VALID:
                bad = [f"{c.name}: {c.observed} {c.detail}" for c in verdict.checks if c.status is not Status.VALID]
                raise SystemExit(f"the {name} run is {verdict.status.value}: {verdict.failure or '; '.join(bad)}")
    return run_folder.load(folder / "static"), run_folder.load(folder / "online")


def compare(static: RunFolder, online: RunFolder) -> Comparison:
    """Figures of two runs of the same tokens, over the places from each layer's first commit on."""
    rows = _balancedness(static, online)
    weights = {place: float(counts.sum()) for place, counts in routed_counts(online).items()}
    moves = layer_moves(online)

    def mean(places: Iterable[Place]) -> Balance:
        chosen = list(places)
        averaged = np.average([rows[p] for p in chosen], axis=0, weights=[weights[p] for p in chosen])
        return Balance(*averaged.tolist())

    def figures(layers: set[int]) -> Figures:
        moved = [m for m in moves if m.layer in layers]
        slots = sum(m.slots for m in moved)
        changed, gained = sum(m.net_slots for m in moved), sum(m.cross_rank_net_slots for m in moved)
        static, online, offline = mean(p for p in rows if p.layer in layers)
        return Figures(static, online, offline, changed / slots, gained / slots)

    every = sorted({p.layer for p in rows})
    by_iteration = {i: mean(p for p in rows if p.iteration == i) for i in sorted({p.iteration for p in rows})}
    return Comparison(figures(set(every)), [figures({layer}) for layer in every], by_iteration)


def _balancedness(static: RunFolder, online: RunFolder) -> dict[Place, Balance]:
    """Static, online and offline balancedness of each place from its layer's first commit on."""
    first: dict[int, int] = {}
    for row in online.evidence.rows(Row.COMMIT):
        first[row["layer"]] = min(row["iteration"], first.get(row["layer"], row["iteration"]))
    before, after = _measured(static), _measured(online)
    counts = routed_counts(online)
    return {
        p: Balance(before[p], after[p], _with_hindsight(counts[p], online.scenario))
        for p in after
        if p.layer in first and p.iteration >= first[p.layer]
    }


def _measured(folder: RunFolder) -> dict[Place, float]:
    loads = measured_loads(folder)
    return dict(zip(loads.places, balancedness(loads.ranks).tolist(), strict=True))


def _with_hindsight(counts: np.ndarray, scenario: Scenario) -> float:
    slots = place(counts, replicate(counts, scenario.slots), scenario.ranks)
    return float(balancedness(Placement(scenario.ranks, scenario.model.experts, slots).rank_load(counts)))


def _table(comparison: Comparison) -> str:
    names = ("layer", "static", "online", "offline", "online / offline", "slots changed", "replicas changed")
    lines = [*enumerate(comparison.layers), ("all", comparison.total)]
    rows = [
        (name, f.static, f.online, f.offline, f.ratio, f"{f.slots_changed:.0%}", f"{f.replicas_changed:.0%}")
        for name, f in lines
    ]
    return tabulate(rows, headers=names, floatfmt=".3f")


def _result(comparison: Comparison, online: RunFolder, loads: Path, iterations: int | None) -> dict[str, Any]:
    size = [] if iterations is None else ["--iterations", str(iterations)]
    scenario = online.scenario
    return {
        "command": shlex.join(["python", "benchmarks/real_loads.py", loads.name, *size]),
        "machine": machine(),
        "git": online.meta["git"],
        "setting": {
            "loads": loads.name, "ranks": scenario.ranks, "iterations": scenario.iterations, "slots": scenario.slots,
            "tokens_per_rank": TOKENS_PER_RANK, "layers": scenario.model.layers, "experts": scenario.model.experts,
            "top_k": scenario.model.top_k, "layer_updates_per_iter": scenario.model.layers, "order": "position",
        },
        "total": asdict(comparison.total) | {"ratio": comparison.total.ratio},
        "layers": [asdict(figures) | {"ratio": figures.ratio} for figures in comparison.layers],
        "iterations": {"columns": Balance._fields, "rows": comparison.iterations},
    }  # fmt: skip


def main() -> None:
    """Run, print a table and keep the figures."""
    parser = argparse.ArgumentParser(description="Online against offline balancing on recorded expert choices.")
    parser.add_argument("loads", type=Path, metavar="LOADS.npz", help="topk_ids [tokens, layers, K] and sequence_id")
    parser.add_argument("--iterations", type=int, help="by default as many as the file has tokens for")
    parser.add_argument("-o", "--output", type=Path, default=RESULT, help="by default %(default)s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        static, online = run(given.loads, given.iterations, Path(folder))
        comparison = compare(static, online)
        result = _result(comparison, online, given.loads, given.iterations)
    print(_table(comparison))
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {os.path.relpath(given.output)}")


if __name__ == "__main__":
    main()
