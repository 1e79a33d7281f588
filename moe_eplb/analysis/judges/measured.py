"""Measured against predicted load: what ranks processed, and the balancedness that the balancer reports."""

from __future__ import annotations

import numpy as np

from moe_eplb.analysis.balance import mean_over_max, measured_loads, predicted_rank_loads
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import CheckResult

__all__ = ["balancedness", "judge_received"]

_TOLERANCE = 1e-6
"""Relative; the reported value went through float32 at most."""


def judge_received(folder: RunFolder, findings: Findings) -> None:
    """Every slot processed exactly the entries that the replica rule sends to it."""
    expected, received = (folder.evidence.by_place(kind) for kind in (Row.EXPECTED, Row.RECEIVED))
    for place in folder.places:
        sources, targets = expected.get(place, {}), received.get(place, {})
        if findings.need_ranks("expected", folder, sources, place) & findings.need_ranks(
            "received", folder, targets, place
        ):
            _compare_slots(
                np.sum([row["slots"] for row in sources.values()], axis=0),
                np.concatenate([targets[rank]["slots"] for rank in folder.ranks]),
                place,
                findings,
            )


def _compare_slots(expected: np.ndarray, received: np.ndarray, place: Place, findings: Findings) -> None:
    if expected.shape != received.shape:
        findings.wrong(f"{len(received)} slots received, {len(expected)} were expected", place)
    elif not np.array_equal(expected, received):
        slot = int(np.flatnonzero(expected != received)[0])
        findings.wrong(
            f"slot {slot} processed {received[slot]} entries, the replica rule gives {expected[slot]}", place
        )


def balancedness(folder: RunFolder) -> CheckResult:
    """The balancedness that the balancer reports is what its counts and its placement give, over ranks."""
    findings = Findings("balancedness", "reported == mean / max of the rank loads that counts and placement give")
    kinds = (Row.BALANCE, Row.REDUCED, Row.PLACEMENT)
    balance, reduced = (folder.evidence.by_place(kind) for kind in kinds[:2])
    compared = 0
    for place in folder.places:
        parts = [rows.get(place, {}) for rows in (balance, reduced, folder.placements)]
        present = [
            findings.need_ranks(kind.value, folder, rows, place) for kind, rows in zip(kinds, parts, strict=True)
        ]
        if all(present):
            compared += 1
            for rank in folder.ranks:
                _compare_value(folder, parts[0][rank], parts[1][rank], parts[2][rank], findings)
    loads = measured_loads(folder)
    measured = f", measured {mean_over_max(loads.ranks):.4f}" if loads.places else ""
    return findings.result(f"{compared} of {len(folder.places)} layers x iterations compared{measured}")


def _compare_value(
    folder: RunFolder, balance: EvidenceRow, reduced: EvidenceRow, placement: EvidenceRow, findings: Findings
) -> None:
    loads = predicted_rank_loads(reduced["counts"], placement["slots"], len(folder.ranks))
    exact, reported = mean_over_max(loads[np.newaxis]), balance["value"]
    if not abs(reported - exact) <= _TOLERANCE * exact:
        where = Place(balance["layer"], balance["iteration"])
        findings.wrong(f"rank {balance['rank']} reported {reported:.6f}, it is {exact:.6f}", where)
