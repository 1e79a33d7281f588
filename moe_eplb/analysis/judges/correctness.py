"""Is the model's output right while experts move: dispatch, weights and outputs."""

from __future__ import annotations

from collections import Counter

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core import workload
from moe_eplb.core.dtypes import state_dtype
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import CheckResult

__all__ = ["attestation", "equality", "exactly_once"]

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float8_e4m3fn": 0.12}
"""Largest allowed max|a-b| / max|b| by the model's dtype. The judge's own: evidence must not loosen its own measure.

Why fp8's is so large, `moe_eplb.checks.equality` says.
"""

_FAULTS = ("missing", "duplicated", "wrong_expert", "invalid_slot")


def exactly_once(folder: RunFolder) -> CheckResult:
    """Each (token, k) was computed once over all ranks, in a slot that holds the routed expert."""
    findings = Findings("exactly_once", "every (token, k) reaches exactly one slot, which holds the routed expert")
    dispatched = folder.evidence.by_place(Row.DISPATCH)
    for place in folder.places:
        findings.need_ranks("dispatch", folder, dispatched.get(place, {}), place)
    rows = folder.evidence.rows(Row.DISPATCH)
    for row in rows:
        _judge_dispatch(folder, row, findings)
    once, expected = (sum(row[name] for row in rows) for name in ("once", "expected"))
    return findings.result(f"{once} of {expected} entries once")


def _judge_dispatch(folder: RunFolder, row: EvidenceRow, findings: Findings) -> None:
    where = f"rank {row['rank']}, {_place(row)}"
    faults = [f"{row[name]} {name}" for name in _FAULTS if row[name]]
    routed = _tokens(folder, row) * folder.scenario.model.top_k
    if faults or row["once"] != row["expected"]:
        said = f": {row['first']}" if row["first"] else ""
        findings.wrong(
            f"{row['once']} of {row['expected']} entries once, {', '.join(faults) or 'others lost'}{said}", where
        )
    elif row["expected"] != routed:
        findings.wrong(f"{row['expected']} entries looked at, the rank routes {routed}", where)


def attestation(folder: RunFolder) -> CheckResult:
    """At the start, after every commit and at the end, each slot's bytes are those of the expert it must hold."""
    findings = Findings("attestation", "every slot holds its expert's master weights after every commit")
    attested = folder.evidence.by_place(Row.ATTEST)
    commits, rows = folder.evidence.rows(Row.COMMIT), folder.evidence.rows(Row.ATTEST)
    for row in commits:
        if row["rank"] not in attested.get(Place(row["layer"], row["iteration"]), {}):
            findings.missing(f"a commit of rank {row['rank']} was not attested", _place(row))
    _need_all_readings(folder, findings)
    for row in rows:
        if row["slots"] != folder.scenario.slots_per_rank:
            said = f"{row['slots']} of {folder.scenario.slots_per_rank} slots"
            findings.missing(f"rank {row['rank']} attested {said}", _place(row))
        for slot, expert, digest in row["mismatched"]:
            findings.wrong(f"slot {slot} does not hold expert {expert}: its digest is {digest}", _place(row))
    return findings.result(f"{sum(row['slots'] for row in rows)} slots attested, {len(commits)} commits")


def _need_all_readings(folder: RunFolder, findings: Findings) -> None:
    """Each layer is read on each rank before the first iteration, after each commit, and after the last iteration."""
    readings, commits = (
        Counter((row["layer"], row["rank"]) for row in folder.evidence.rows(kind)) for kind in (Row.ATTEST, Row.COMMIT)
    )
    for layer in range(folder.scenario.model.layers):
        for rank in folder.ranks:
            needed = 2 + commits[layer, rank]
            if readings[layer, rank] < needed:
                found = f"{readings[layer, rank]} of {needed} readings"
                findings.missing(f"rank {rank}, layer {layer}: {found} of the slots")


def equality(folder: RunFolder) -> CheckResult:
    """Every output of every rank equals the slow reference within the data type's tolerance."""
    findings = Findings("equality", "max|a-b| / max|b| within the tolerance of the data type")
    outputs = folder.evidence.by_place(Row.EQUALITY)
    for place in folder.places:
        findings.need_ranks("equality", folder, outputs.get(place, {}), place)
    rows = folder.evidence.rows(Row.EQUALITY)
    for row in rows:
        _judge_output(folder, row, findings)
    if not any(row["tokens"] for row in rows):
        findings.missing("no output was compared")
    worst = max((row["ratio"] for row in rows), default=float("nan"))
    return findings.result(f"{len(rows)} outputs compared, largest ratio {worst:.3g}")


def _judge_output(folder: RunFolder, row: EvidenceRow, findings: Findings) -> None:
    where = f"rank {row['rank']}, {_place(row)}"
    tolerance, tokens = TOLERANCE[folder.scenario.model.dtype], _tokens(folder, row)
    _judge_ratio("ratio", row["ratio"], tolerance, where, findings)
    if row["tokens"] != tokens:
        findings.missing(f"{row['tokens']} of {tokens} tokens were compared", where)
    if "misrouted" not in row:
        findings.missing("the router's choice was not compared", where)
    elif row["misrouted"]:
        findings.wrong(
            f"{row['misrouted']} of {tokens} tokens went to other experts than the router's rule says", where
        )
    if folder.scenario.model.shared_intermediate:
        shared = TOLERANCE[state_dtype(folder.scenario.model.dtype)]
        _judge_part("shared", "the shared expert", shared, row, tokens, findings)
        _judge_part("block", "the block's sum", max(tolerance, shared), row, tokens, findings)


def _judge_part(part: str, what: str, tolerance: float, row: EvidenceRow, tokens: int, findings: Findings) -> None:
    where = f"rank {row['rank']}, {_place(row)}"
    ratio, compared = row.get(f"{part}_ratio", 0.0), row.get(f"{part}_tokens", 0)
    _judge_ratio(f"{what}: ratio", ratio, tolerance, where, findings)
    if compared != tokens:
        findings.missing(f"{what}: {compared} of {tokens} tokens were compared", where)


def _judge_ratio(what: str, ratio: float, tolerance: float, where: str, findings: Findings) -> None:
    # A ratio that is not a number compares false and must not pass.
    if not 0 <= ratio <= tolerance:
        findings.wrong(f"{what} {ratio:.3g} {'< 0' if ratio < 0 else f'> {tolerance:.3g}'}", where)


def _tokens(folder: RunFolder, row: EvidenceRow) -> int:
    """Tokens that the row's layer takes from its rank in all its runs of the iteration."""
    each = workload.tokens(folder.scenario, row["iteration"], row["rank"])
    return each * folder.scenario.model.repeats(row["layer"])


def _place(row: EvidenceRow) -> Place:
    return Place(row["layer"], row["iteration"])
