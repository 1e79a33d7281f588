"""What HolisticTraceAnalysis says about the overlap of made-up traces, as a table to hold our own numbers against.

    python benchmarks/hta_overlap.py --hta PYTHON [--out FILE]

PYTHON is an interpreter that has HolisticTraceAnalysis 0.5.0 with a pandas before 3. The traces are those that
`made_traces` makes anew from their seeds, so only the numbers are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.analysis.profiler_traces import (  # noqa: E402
    ProfilerTrace,
    expert_parallel,
    nccl_beside_compute,
    unrelated_streams,
)

__all__ = ["TABLE", "TIMEOUT_S", "made_traces", "run_hta"]

TABLE = ROOT / "tests/analysis/data/hta_0_5_0.json"
RANKS, SEEDS = 3, 30
TIMEOUT_S = 600

# Its own figure is a share rounded to two digits. The same code without the rounding, and the length of the
# communication that it merged, give the nanoseconds.
_CHILD = """
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
from importlib import metadata
from hta.analyzers import communication_analysis as module
from hta.trace_analysis import TraceAnalysis

merged = []
merge = module.merge_kernel_intervals

def noted(kernels):
    found = merge(kernels)
    merged.append(float((found["end"] - found["ts"]).sum()))
    return found

def answers(files):
    analysis = TraceAnalysis(trace_files={int(rank): name for rank, name in files.items()})
    rounded = analysis.get_comm_comp_overlap(visualize=False)
    merged.clear()
    module.merge_kernel_intervals, module.round = noted, lambda values, digits: values
    exact = analysis.get_comm_comp_overlap(visualize=False)
    module.merge_kernel_intervals = merge
    del module.round
    rows = {}
    for number, rank in enumerate(exact["rank"]):  # compute is merged first, then communication
        share, percent = (float(found["comp_comm_overlap_pctg"][number]) for found in (exact, rounded))
        comm = merged[2 * number + 1]
        rows[str(rank)] = {
            "percent": None if percent != percent else percent, "communication_ns": round(comm * 1000),
            "hidden_ns": None if share != share else round(share / 100 * comm * 1000),
        }
    return rows

if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    found = {name: answers(files) for name, files in asked.items()}
    versions = {name: metadata.version(name) for name in ("HolisticTraceAnalysis", "pandas", "numpy")}
    json.dump({"versions": versions, "answers": found}, open(sys.argv[2], "w"))
"""


def made_traces() -> dict[str, list[ProfilerTrace]]:
    """Traces of several ranks by name."""
    made = {}
    for seed in range(SEEDS):
        made[f"whole us {seed}"] = [unrelated_streams(rank, seed, fractional=False) for rank in range(RANKS)]
        made[f"three decimals {seed}"] = [unrelated_streams(rank, seed, fractional=True) for rank in range(RANKS)]
    for seed in range(5):
        made[f"in step {seed}"] = [nccl_beside_compute(rank, 300, 10 * seed + rank, 1 + seed % 3) for rank in range(2)]
    made["expert parallel"] = [expert_parallel(rank) for rank in range(2)]
    return made


def run_hta(python: str, made: dict[str, list[ProfilerTrace]]) -> dict[str, Any]:
    """Its versions, and by trace and rank its percentage with what it was computed from, in ns; None for NaN."""
    with tempfile.TemporaryDirectory(prefix="hta_overlap_") as name:
        folder = Path(name)
        asked = {
            label: {one.rank: str(one.write(folder / f"{label}.{one.rank}.json".replace(" ", "_"))) for one in ranks}
            for label, ranks in made.items()
        }
        script, question, answer = folder / "child.py", folder / "question", folder / "answer"
        script.write_text(_CHILD, encoding="utf-8")
        question.write_text(json.dumps(asked), encoding="utf-8")
        # Without this it cuts times to whole microseconds: starts up, ends down.
        environment = os.environ | {"HTA_DISABLE_NS_ROUNDING": "1"}
        environment.pop("PYTHONPATH", None)
        subprocess.run([python, script, question, answer], env=environment, cwd=folder, timeout=TIMEOUT_S, check=True)
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hta", required=True, help="an interpreter that has HolisticTraceAnalysis")
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    found = {"command": "python benchmarks/hta_overlap.py --hta PYTHON"} | run_hta(arguments.hta, made_traces())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(ranks)}" for name, ranks in found.pop("answers").items())
    head = json.dumps(found, indent=1)[:-2]
    arguments.out.write_text(f'{head},\n "answers": {{\n{rows}\n }}\n}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
