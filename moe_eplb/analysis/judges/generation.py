"""Did a whole model say the same as it says without us."""

from __future__ import annotations

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, RunFolder
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import CheckResult

__all__ = ["generation"]


def generation(folder: RunFolder) -> CheckResult:
    """Every sequence of every rank is, token for token, what the same model generates with its own MoE blocks."""
    findings = Findings("generation", "each rank generates the tokens that transformers' own model generates")
    rows = {row["rank"]: row for row in folder.evidence.rows(Row.GENERATED)}
    findings.need_ranks("generated", folder, rows)
    compared = sum(_judge_rank(folder, rank, row, findings) for rank, row in sorted(rows.items()))
    return findings.result(f"{compared} tokens of {len(rows)} ranks compared")


def _judge_rank(folder: RunFolder, rank: int, row: EvidenceRow, findings: Findings) -> int:
    """How many tokens could be compared."""
    generated, expected = row["tokens"], row["expected"]
    sequences = folder.scenario.sequences(rank)
    wanted = [folder.scenario.iterations] * sequences
    for name, tokens in (("generated", generated), ("expected", expected)):
        if [len(sequence) for sequence in tokens] != wanted:
            found = f"{len(tokens)} sequences of {sorted({len(sequence) for sequence in tokens})} tokens"
            findings.missing(f"{name}: {found}, not {sequences} of {folder.scenario.iterations}", f"rank {rank}")
            return 0
    for index, (mine, theirs) in enumerate(zip(generated, expected, strict=True)):
        differing = [at for at, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
        if differing:
            at = differing[0]
            findings.wrong(f"sequence {index} says {mine[at]} instead of {theirs[at]} at token {at}", f"rank {rank}")
    return sum(wanted)
