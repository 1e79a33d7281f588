"""Reads damaged traces and analyses what was read: only a `TraceError` may come of it, soon, and nothing is written.

    python -m tests.analysis.fuzz_traces [--seconds N] [--seed N] [--keep FOLDER]

Files that do more than that are kept, with the error beside them.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from types import FrameType

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.collectives import straggling
from moe_eplb.analysis.critical_path import iteration_paths
from moe_eplb.analysis.exposed import largest_exposed
from moe_eplb.analysis.idle import gpu_idle
from moe_eplb.analysis.merge import merge
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.overlap import PAIRS, Hidden, measure
from moe_eplb.analysis.ranges import project
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.readers.limits import Limits
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.stall import main_stall
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.analysis.work import work_of_capture
from moe_eplb.core.errors import TraceError
from tests.analysis.fuzz_mutations import FORMS, mutated

__all__ = ["LIMITS", "SECONDS", "analyse", "examine", "within"]

LIMITS = Limits(events=20_000, text_bytes=2 << 20, piece_bytes=1 << 20, seconds=2.0)
SECONDS = 10.0
"""The longest that a damaged file may take."""
_FEW = 1_000


class TooLong(BaseException):
    """An example did not end; no `except Exception` of what is tested catches it."""


def main() -> int:
    """Damage files for some time; 1 when one did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_traces")
    arguments = parser.parse_args()
    ends: Counter[str] = Counter()
    found: Counter[str] = Counter()
    until, number, slowest = time.monotonic() + arguments.seconds, 0, 0.0
    with tempfile.TemporaryDirectory(prefix="fuzz_traces_") as folder:
        while time.monotonic() < until:
            form = list(FORMS)[number % len(FORMS)]
            content, begun = mutated(form, Random(f"{arguments.seed} {number}")), time.monotonic()
            try:
                ends[f"{form}: {examine(Path(folder) / 't', content)}"] += 1
            except (Exception, TooLong) as error:
                _keep(arguments.keep, f"{arguments.seed}_{number}", content, found, error)
            number, slowest = number + 1, max(slowest, time.monotonic() - begun)
    for end, times in sorted(ends.items()):
        print(f"{times:8} {end}")
    print(f"seed {arguments.seed}: {number} files, the slowest {slowest:.2f} s, {found.total()} findings")
    for what, times in found.most_common():
        print(f"{times:8} {what}")
    return bool(found)


def _keep(folder: Path, name: str, content: bytes, found: Counter[str], error: BaseException) -> None:
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/moe_eplb/" in frame.filename]
    place = ours[-1] if ours else last
    what = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:120]}"
    found[what] += 1
    if found[what] == 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / f"{name}.txt").write_text("".join(traceback.format_exception(error)))


def examine(path: Path, content: bytes, seconds: float = SECONDS) -> str:
    """Read and analyse one file alone in its folder; the code of the error, or ``read``."""
    path.write_bytes(content)
    with within(seconds):
        try:
            analyse(read_capture(path, LIMITS))
            end = "read"
        except TraceError as error:
            end = error.code
    written = [p for p in path.parent.iterdir() if p != path]
    for other in written:
        other.unlink()  # the next file has the folder for itself
    assert not written, f"{written} were written"
    assert path.read_bytes() == content, "the file was changed"
    return end


def analyse(capture: Capture) -> None:
    """Every analysis; what must hold for any trace is asserted."""
    capture = prepare(capture)
    work = work_of_capture(capture)
    for pair in PAIRS.values():
        overlap = measure(work, pair)
        for part in (overlap.cells, overlap.ranks, overlap.iterations, overlap.streams, {0: overlap.whole}):
            assert all(_possible(hidden) for hidden in part.values())
        assert all(stretch.length > 0 for stretch in largest_exposed(capture, pair))
    for idle in gpu_idle(capture):
        assert sum(idle.causes.values()) == idle.idle
        assert 0 <= idle.idle <= idle.span
        assert min(idle.causes.values()) >= 0
    for part in gpu_idle(capture, Selection(iterations=((0, 2),))):
        assert sum(part.causes.values()) == part.idle <= part.span
    stall = main_stall(capture)
    assert stall is None or min([0, *stall.idle.values(), *stall.spin.values()]) == 0
    for path in iteration_paths(capture).values():
        assert all(one.end == two.start for one, two in pairwise(path.parts))
        assert sum(path.by_what().values()) == path.length >= 0
    stragglers = straggling(capture)
    assert not stragglers.late.size or stragglers.late.min() >= 0
    assert all(math.isfinite(value) and value >= 1 for value in stragglers.imbalance.tolist())
    if len(capture.ranges) <= _FEW:  # it looks at every range for itself
        assert all(one.busy_ns <= one.span_ns for one in project(capture))
    report = make_trace_report(capture)
    assert all(row.busy_ns <= row.total_ns for row in report.roles)
    check_order(capture)
    merge([capture, _of_other_ranks(capture)])


def _of_other_ranks(capture: Capture) -> Capture:
    tables = {name: table.copy() for name, table in capture.tables().items()}
    for table in tables.values():
        if "rank" in (table.dtype.names or ()):
            table["rank"] = table["rank"] // 2 + (1 << 30)
    return replace(capture, source="another").with_tables(tables)


def _possible(hidden: Hidden) -> bool:
    return 0 <= hidden.hidden <= hidden.total


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End what takes longer, in the main thread."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
