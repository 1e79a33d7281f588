"""Do the ranks' clocks agree: no rank leaves a collective before the last one has entered it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import Capture, Names
from moe_eplb.analysis.collectives import collective_kernels, stem
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.core.verdict import CheckResult

__all__ = ["clocks"]


def clocks(capture: Capture) -> CheckResult:
    """The ranks' times fit one clock, as far as their collectives tell."""
    findings = Findings("clocks", "no rank leaves a collective before another one has entered it")
    ranks = [rank for rank in capture.ranks if rank >= 0]
    if len(ranks) < 2:
        return findings.result(f"{len(ranks)} rank, so one clock")
    rows = _collectives(capture)
    if not len(rows):
        findings.missing(f"ranks {', '.join(map(str, ranks))} have no collective in common that shows it")
        return findings.result("0 collectives")
    starts, ends = capture.gpu["start"][rows], capture.gpu["end"][rows]
    of = np.unique(capture.gpu["rank"]).tolist()
    for a, b in combinations(range(rows.shape[1]), 2):
        _judge(starts[:, [a, b]], ends[:, [a, b]], (of[a], of[b]), findings)
    return findings.result(f"{len(rows)} collectives of {rows.shape[1]} ranks")


def _collectives(capture: Capture) -> NDArray[np.int64]:
    """Rows [N, R] of the collectives that no rank can leave early: the n-th of a name in a layer of an iteration.

    Where ranks have unequally many it cannot be known which belong together, and they are left out.
    """
    gpu, names = capture.gpu, capture.names
    stems = np.array(Names().numbers(map(stem, names)), np.int64)
    rows = np.flatnonzero(collective_kernels(capture, all_wait=True) & (gpu["rank"] >= 0))
    ranks, of_rank = np.unique(gpu["rank"], return_inverse=True)
    _, key = distinct_rows([stems[gpu["name"][rows]], gpu["layer"][rows], gpu["iteration"][rows]])
    counts = np.zeros((int(key.max(initial=-1)) + 1, len(ranks)), np.int64)
    np.add.at(counts, (key, of_rank[rows]), 1)
    even = (counts == counts[:, :1]).all(axis=1)
    rows, key = rows[even[key]], key[even[key]]
    order = np.lexsort((gpu["start"][rows], of_rank[rows], key))
    # Of each name, layer and iteration there is a block of ranks x times; its transpose pairs them.
    blocks = np.split(rows[order], np.flatnonzero(np.diff(key[order])) + 1) if len(rows) else []
    found = [block.reshape(len(ranks), -1).T for block in blocks]
    return np.concatenate(found) if found else np.empty((0, len(ranks)), np.int64)


def _judge(starts: NDArray[np.int64], ends: NDArray[np.int64], ranks: tuple[int, int], findings: Findings) -> None:
    """What may be added to the second clock lies between what each collective allows; 0 must be allowed."""
    least, most = int((starts[:, 0] - ends[:, 1]).max()), int((ends[:, 0] - starts[:, 1]).min())
    apart = f"ranks {ranks[0]} and {ranks[1]}"
    if least > most:
        findings.wrong(f"{apart}: no offset of their clocks fits all collectives, they miss by {least - most} ns")
    elif least > 0:
        findings.wrong(f"{apart}: rank {ranks[1]}'s clock is behind by {least} to {most} ns")
    elif most < 0:
        findings.wrong(f"{apart}: rank {ranks[1]}'s clock is ahead by {-most} to {-least} ns")
