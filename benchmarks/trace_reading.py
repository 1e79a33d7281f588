"""What it costs to read a trace and to analyse it: seconds and peak memory on one core, at several sizes.

    python benchmarks/trace_reading.py [--out FILE] [--repeat N] [--hta PYTHON]

Every sample is a process of its own, bound to one core, so that its peak memory is its own. The files are made by
`benchmarks.trace_files` and are in the page cache. Ends with status 1 when a target is missed by the fastest sample:
other work on the machine only adds. With `--hta`, an interpreter that has HolisticTraceAnalysis reads the same Chrome
trace and computes its overlap in the same run. `overlap_s` is roles and one pair, as that tool does it; `report_s`
everything that a report says besides: all pairs, exposed stretches, idle time, critical paths, stalls, stragglers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from benchmarks.trace_files import write_chrome, write_nsys  # noqa: E402

SIZES = (100_000, 300_000, 1_000_000)
CHROME_EVENTS, CHROME_SECONDS, CHROME_MB = 570_000, 5.0, 600.0
NSYS_KERNELS, NSYS_SECONDS, ANALYSES_SECONDS = 1_000_000, 8.0, 10.0
LINEAR, LINEAR_ANALYSES = 1.3, 1.6
"""How much dearer an event may be in the largest file than in the smallest; columns of the smallest stay in caches."""
TIMEOUT_S = 600

_SAMPLE = """
import json, os, resource, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from moe_eplb.analysis.overlap import PAIRS, measure
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.analysis.work import work_of_capture
begun = time.perf_counter()
capture = read_capture(Path(sys.argv[1]))
read = time.perf_counter()
read_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
capture = prepare(capture)
whole = measure(work_of_capture(capture), PAIRS["communication_waits"]).whole
done = time.perf_counter()
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
report = make_trace_report(capture)
reported = time.perf_counter()
print(json.dumps({
    "read_s": read - begun, "read_peak_mb": read_mb, "overlap_s": done - read,
    "overlap_ns": [whole.total, whole.hidden], "peak_mb": peak_mb, "report_s": reported - done,
    "report_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "gpu_events": len(capture.gpu),
    "calls": len(capture.calls), "ranges": len(capture.ranges),
}))
"""
_HTA = """
import json, logging, os, resource, sys, time, warnings
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
from importlib import metadata
from hta.trace_analysis import TraceAnalysis
if __name__ == "__main__":
    begun = time.perf_counter()
    analysis = TraceAnalysis(trace_files={0: sys.argv[1]})
    read = time.perf_counter()
    share = float(analysis.get_comm_comp_overlap(visualize=False)["comp_comm_overlap_pctg"].iloc[0])
    done = time.perf_counter()
    print(json.dumps({
        "read_s": read - begun, "overlap_s": done - read, "overlap_percent": share,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {name: metadata.version(name) for name in ("HolisticTraceAnalysis", "pandas", "numpy")},
    }))
"""


def main() -> int:
    """Make the files, take the samples, write the result; 1 when a target is missed."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="trace_reading_") as folder:
        files = _files(Path(folder))
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
        for _ in range(arguments.repeat):  # in turns, so that a busy minute does not fall on one size alone
            for name, path in files.items():
                samples[name].append(_sample([sys.executable, "-c", _SAMPLE, str(path)]))
                print(f"{name}: {samples[name][-1]['read_s']:.2f} s", file=sys.stderr)
        other = _other(arguments.hta, files[f"chrome {CHROME_EVENTS}"], arguments.repeat, Path(folder))
        bytes_of = {name: path.stat().st_size for name, path in files.items()}
    missed = _missed(samples)
    result = {
        "command": "python benchmarks/trace_reading.py", "machine": _machine(), "file_bytes": bytes_of,
        "samples": samples, "holistic_trace_analysis": other, "missed": missed,
        "fastest_read_s": _fastest(samples, "read_s"), "median_read_s": _median(samples, "read_s"),
        "fastest_report_s": _fastest(samples, "report_s"), "median_report_s": _median(samples, "report_s"),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(missed) or "every target is met")
    return bool(missed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/trace_reading_cpu.json")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hta", type=Path, help="an interpreter that has HolisticTraceAnalysis")
    return parser.parse_args()


def _files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for events in sorted({*SIZES, CHROME_EVENTS}):
        files[f"chrome {events}"] = folder / f"{events}.json.gz"
        write_chrome(files[f"chrome {events}"], events)
    for kernels in sorted({*SIZES, NSYS_KERNELS}):
        files[f"nsys {kernels}"] = folder / f"{kernels}.sqlite"
        write_nsys(files[f"nsys {kernels}"], kernels)
    return files


def _sample(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    sample: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return sample


def _other(python: Path | None, path: Path, repeat: int, folder: Path) -> list[dict[str, Any]] | None:
    if python is None:
        return None
    script = folder / "other.py"  # a file, since its workers import it again
    script.write_text(_HTA, encoding="utf-8")
    return [_sample([str(python), str(script), str(path)]) for _ in range(repeat)]


def _machine() -> dict[str, Any]:
    found = machine()
    found["versions"]["orjson"] = metadata.version("orjson")
    return found


def _fastest(samples: dict[str, list[dict[str, Any]]], what: str) -> dict[str, float]:
    return {name: min(sample[what] for sample in of_file) for name, of_file in samples.items()}


def _median(samples: dict[str, list[dict[str, Any]]], what: str) -> dict[str, float]:
    return {name: median(sample[what] for sample in of_file) for name, of_file in samples.items()}


def _missed(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    fastest, report = _fastest(samples, "read_s"), _fastest(samples, "report_s")
    overlap = _fastest(samples, "overlap_s")
    peak = max(sample["read_peak_mb"] for sample in samples[f"chrome {CHROME_EVENTS}"])
    found = [
        (f"chrome {CHROME_EVENTS}: s", fastest[f"chrome {CHROME_EVENTS}"], CHROME_SECONDS),
        (f"chrome {CHROME_EVENTS}: MB", peak, CHROME_MB),
        (f"nsys {NSYS_KERNELS}: s", fastest[f"nsys {NSYS_KERNELS}"], NSYS_SECONDS),
        (
            f"nsys {NSYS_KERNELS}: s of all analyses",
            overlap[f"nsys {NSYS_KERNELS}"] + report[f"nsys {NSYS_KERNELS}"],
            ANALYSES_SECONDS,
        ),
    ]
    for form in ("chrome", "nsys"):
        for what, times, most in (("cost", fastest, LINEAR), ("analyses", report, LINEAR_ANALYSES)):
            each = [times[f"{form} {size}"] / size for size in SIZES]
            found.append((f"{form}: an event's {what} in the largest file / in the smallest", each[-1] / each[0], most))
    return [f"{what}: {value:.2f}, at most {most:g}" for what, value, most in found if value > most]


if __name__ == "__main__":
    sys.exit(main())
