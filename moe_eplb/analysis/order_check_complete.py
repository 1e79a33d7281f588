"""What a capture lacks: whatever is missing may have been the very thing that was out of order."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.ranges import match_pairs
from moe_eplb.core.events import KINDS, Kind

__all__ = ["lacks"]

_KERNEL_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
_CAPTURE_BEGINS, _CAPTURE_ENDS = "BeginCapture", "EndCapture"


def lacks(capture: Capture, calls: Table, holes: list[str]) -> list[str]:
    """What is missing, in words.

    Args:
        calls: The balancer's calls, of type `CALLED`.
        holes: What their replay found to be missing.
    """
    said = [capture.incomplete] if capture.incomplete else []
    of_calls = [*_missing_ranks(capture, calls), *_never_closed(calls), *holes, *_uneven(calls)]
    return [*said, *of_calls, *_lost_kernels(capture)]


def _missing_ranks(capture: Capture, calls: Table) -> list[str]:
    found = []
    ranks = [rank for rank in capture.ranks if rank >= 0]
    pairs = list(itertools.pairwise(ranks))
    if absent := sum(after - before - 1 for before, after in pairs):
        first = next(before + 1 for before, after in pairs if after > before + 1)
        found.append(f"not in the trace: rank {first}" + (f" and {absent - 1} more" if absent > 1 else ""))
    if silent := sorted({*np.unique(capture.gpu["rank"]).tolist()} - {*np.unique(calls["rank"]).tolist()}):
        found.append(f"no call was seen of rank {_listed(silent)}")
    return found


def _never_closed(calls: Table) -> list[str]:
    unclosed = calls[(calls["end"] == c.UNKNOWN) & (calls["kind"] < Kind.START_ITER)]
    return [
        f"rank {rank}: {KINDS[Kind(kind)].name} of layer {layer}, iteration {iteration} never ended"
        for rank, kind, layer, iteration in unclosed[["rank", "kind", "layer", "iteration"]].tolist()[:3]
    ]


def _uneven(calls: Table) -> list[str]:
    """Iterations that some rank has begun and another one not; all ranks make the same ones."""
    begins = calls[calls["kind"] == Kind.START_ITER]
    ranks = np.unique(calls["rank"]).tolist()
    of_rank = {rank: set(begins["iteration"][begins["rank"] == rank].tolist()) for rank in ranks}
    every = set().union(*of_rank.values())
    return [
        f"rank {rank} lacks what other ranks have: iteration {_listed(sorted(every - mine))}"
        for rank, mine in of_rank.items()
        if every - mine
    ]


def _lost_kernels(capture: Capture) -> list[str]:
    """Launches of kernels without a kernel, except while a graph is captured, which runs nothing."""
    gpu, api = capture.gpu, capture.calls
    launches = api[_named(capture, *_KERNEL_LAUNCHES) & (api["correlation"] > 0)]
    if not len(launches) or not len(gpu):
        return []
    met = match_pairs(launches["process"], launches["correlation"], gpu["process"], gpu["correlation"]) >= 0
    lost = launches[~met]
    lost = lost[~_while_capturing(capture, lost)]
    return [
        f"rank {rank}: launches whose kernels are not in the trace: {int((lost['rank'] == rank).sum())}"
        for rank in np.unique(lost["rank"]).tolist()
    ]


def _while_capturing(capture: Capture, launches: Table) -> NDArray[np.bool_]:
    begins, ends = (capture.calls[_named(capture, name)] for name in (_CAPTURE_BEGINS, _CAPTURE_ENDS))
    during = np.zeros(len(launches), np.bool_)
    for process in np.unique(launches["process"]).tolist():
        mine = launches["process"] == process
        begun = np.searchsorted(np.sort(begins["start"][begins["process"] == process]), launches["start"][mine])
        ended = np.searchsorted(np.sort(ends["end"][ends["process"] == process]), launches["start"][mine])
        during[mine] = begun > ended
    return during


def _named(capture: Capture, *parts: str) -> NDArray[np.bool_]:
    numbers = [number for number, name in enumerate(capture.names) if any(part in name for part in parts)]
    found: NDArray[np.bool_] = np.isin(capture.calls["name"], numbers)
    return found


def _listed(numbers: list[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
