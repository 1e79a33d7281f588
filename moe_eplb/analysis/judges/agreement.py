"""Do all ranks count and decide the same."""

from __future__ import annotations

import numpy as np

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import CheckResult

__all__ = ["agreement", "statistics"]


def statistics(folder: RunFolder) -> CheckResult:
    """The reduced counts of every rank are exactly the sum over ranks of the counted expert ids."""
    findings = Findings("statistics", "reduced counts of every rank == sum over ranks of the routed counts")
    routed = folder.evidence.by_place(Row.ROUTED)
    reduced = folder.evidence.by_place(Row.REDUCED)
    compared = 0
    for place in folder.places:
        here, sums = routed.get(place, {}), reduced.get(place, {})
        if findings.need_ranks("routed", folder, here, place) & findings.need_ranks("reduced", folder, sums, place):
            compared += 1
            _compare_counts(np.sum([row["counts"] for row in here.values()], axis=0), sums, place, findings)
    return findings.result(f"{compared} of {len(folder.places)} layers x iterations compared")


def _compare_counts(exact: np.ndarray, sums: dict[int, EvidenceRow], place: Place, findings: Findings) -> None:
    for rank, row in sums.items():
        counts = np.asarray(row["counts"])
        if not np.array_equal(counts, exact):
            if counts.shape != exact.shape:
                findings.wrong(f"rank {rank} reduced {len(counts)} counts, there are {len(exact)} experts", place)
                continue
            expert = int(np.flatnonzero(counts != exact)[0])
            findings.wrong(f"rank {rank}, expert {expert}: reduced {counts[expert]}, routed {exact[expert]}", place)


def agreement(folder: RunFolder) -> CheckResult:
    """All ranks route by the same placement, and commit the same plans in the same iterations."""
    findings = Findings("agreement", "the same placement and the same commits on every rank")
    placements = folder.placements
    ended = {row["rank"] for row in folder.evidence.rows(Row.END)}
    for place in folder.places:
        rows = placements.get(place, {})
        findings.need_ranks("placement", folder, rows, place)
        _same(rows, ("digest", "slots"), "placement", place, findings)
    for place, rows in folder.evidence.by_place(Row.COMMIT).items():
        for rank in folder.ranks:
            if rank not in rows:
                # A rank that died has no say in what it would have committed.
                note = findings.wrong if rank in ended else findings.missing
                note(f"rank {rank} did not commit what others did", place)
        _same(rows, ("digest", "changed"), "commit", place, findings)
    for row in folder.evidence.rows(Row.DROPPED):
        if row["digests_differ"]:
            where = Place(row["layer"], row["iteration"])
            findings.wrong(f"rank {row['rank']}: the ranks made different plans ({row['reason']})", where)
    return findings.result(f"{len(placements)} placements, {len(folder.evidence.by_place(Row.COMMIT))} commits")


def _same(rows: dict[int, EvidenceRow], names: tuple[str, ...], what: str, place: Place, findings: Findings) -> None:
    first: tuple[int, EvidenceRow] | None = None
    for rank, row in sorted(rows.items()):
        first = first or (rank, row)
        differing = [name for name in names if row[name] != first[1][name]]
        if differing:
            name = differing[0]
            findings.wrong(f"{what} {name} differs: rank {first[0]} {first[1][name]}, rank {rank} {row[name]}", place)
