"""How planning and the balance that it predicts go with the number of ranks: a table and a picture for the docs.

    python benchmarks/planner_scale.py [--seed N] [--out FOLDER]

Simulated: loads are drawn (lognormal, deviation 1), nothing runs on these ranks. 58 layers of 256 experts; slots are
the experts and an eighth more, rounded up to as many on each rank, at least one. `incremental` starts from what
`refine` made for the same loads before a walk of 3 %, the others from nothing. Writes planner_scale.md and
planner_scale.svg; the picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from moe_eplb.planning.bounds import lower_bounds  # noqa: E402
from moe_eplb.planning.policies import solve  # noqa: E402
from moe_eplb.planning.problem import Problem  # noqa: E402

LAYERS, EXPERTS, WALK = 58, 256, 0.03
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
POLICIES = ("static", "greedy", "refine", "incremental")
REPEAT = 3
COLOURS = {"static": "#6b7482", "greedy": "#0072b2", "refine": "#b34d00", "incremental": "#007a58"}
MARKS = {"static": "s", "greedy": "o", "refine": "^", "incremental": "D"}
HEAD = """# Planning at scale, simulated

Made by `python benchmarks/planner_scale.py --seed {seed}`
({cpu}, one thread, without compiling; the fastest of {repeat} plans).
The machine is shared with others: medians were up to {slower:.1f} times as long. Loads are drawn (lognormal,
deviation 1), {layers} layers of {experts} experts; nothing ran on these ranks. `incremental` starts from what `refine`
made before a walk of {walk:.0%} and goes as far as greedy's balance. Balancedness is the mean rank load / the largest,
both summed over layers; no placement on these slots reaches more than the bound, which is low where they are too few to
split a hot expert as often as it takes.

![planning time and balancedness by ranks](planner_scale.svg)

| ranks | slots | bound | {policies} | {times} | moved by incremental |
|---|---|---|{rules}
"""


def measure(seed: int) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    rows = []
    for ranks in RANKS:
        rng = np.random.default_rng([seed, ranks])
        slots = max(-(-(EXPERTS + EXPERTS // 8) // ranks), 1) * ranks
        before = np.exp(rng.normal(0, 1, (LAYERS, EXPERTS)))
        current = solve(Problem(before, ranks, slots, allow_duplicates=slots > EXPERTS * ranks), "refine").slots
        load = before * np.exp(rng.normal(0, WALK, before.shape))
        row: dict[str, Any] = {"ranks": ranks, "slots": slots}
        bounds = np.array([one.best for one in lower_bounds(Problem(load, ranks, slots), load)])
        row["bound"] = float(load.sum() / ranks / bounds.sum())
        for policy in POLICIES:
            problem = Problem(load, ranks, slots, current=current if policy == "incremental" else None)
            answers = [solve(problem, policy) for _ in range(REPEAT)]
            loads = answers[0].rank_loads(load, problem)
            samples = [one.milliseconds for one in answers]
            row[policy] = float(loads.mean(axis=1).sum() / loads.max(axis=1).sum())
            row[f"{policy} ms"], row[f"{policy} slower"] = min(samples), float(np.median(samples)) / min(samples)
            if policy == "incremental":
                row["moved"] = float((answers[0].slots != current).mean())
        rows.append(row)
        print({key: round(value, 4) for key, value in row.items()}, flush=True)
    return rows


def table(rows: list[dict[str, Any]], seed: int) -> str:
    """The page."""
    timed = [policy for policy in POLICIES if policy != "static"]
    head = HEAD.format(
        seed=seed, cpu=machine()["cpu"], repeat=REPEAT, layers=LAYERS, experts=EXPERTS, walk=WALK,
        slower=max(row[f"{policy} slower"] for row in rows for policy in timed),
        policies=" | ".join(POLICIES), times=" | ".join(f"{policy}, ms" for policy in timed),
        rules="---|" * (len(POLICIES) + len(timed) + 1),
    )  # fmt: skip
    lines = [
        f"| {row['ranks']} | {row['slots']} | {row['bound']:.4f} | "
        + " | ".join([f"{row[policy]:.4f}" for policy in POLICIES] + [f"{row[f'{policy} ms']:.1f}" for policy in timed])
        + f" | {row['moved']:.1%} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Balancedness and milliseconds by ranks, both with a line for each policy."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "planner_scale"  # the same figures make the same file
    from matplotlib import pyplot

    figure, (balance, cost) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ranks = [row["ranks"] for row in rows]
    balance.plot(ranks, [row["bound"] for row in rows], color="#1b1f24", linestyle=":", label="bound")
    for policy in POLICIES:
        look = {"color": COLOURS[policy], "marker": MARKS[policy], "label": policy}
        balance.plot(ranks, [row[policy] for row in rows], **look)
        if policy != "static":
            cost.plot(ranks, [row[f"{policy} ms"] for row in rows], **look)
    for axis, name in ((balance, "balancedness"), (cost, "ms for 58 layers, one thread")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(one) for one in ranks])
        axis.set(xlabel="ranks", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    balance.set_ylim(0, 1.02)
    cost.set_yscale("log")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> int:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31))
    arguments = parser.parse_args()
    rows = measure(arguments.seed)
    (arguments.out / "planner_scale.md").write_text(table(rows, arguments.seed))
    picture(rows, arguments.out / "planner_scale.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
