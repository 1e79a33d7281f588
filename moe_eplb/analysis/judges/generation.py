"""Did a whole model say the same as it says without us."""

from __future__ import annotations

from moe_eplb.analysis.judges.correctness import TOLERANCE
from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, RunFolder
from moe_eplb.core.evidence import Row
from moe_eplb.core.verdict import CheckResult

__all__ = ["generation"]


def generation(folder: RunFolder) -> CheckResult:
    """After each token of what the same model generates with its own MoE blocks, ours says the same next one.

    Another one is excused where the other model itself likes it as well as its own, within the tolerance of outputs.
    """
    findings = Findings("generation", "each rank generates the tokens that transformers' own model generates")
    rows = {row["rank"]: row for row in folder.evidence.rows(Row.GENERATED)}
    findings.need_ranks("generated", folder, rows)
    judged = [_judge_rank(folder, rank, row, findings) for rank, row in sorted(rows.items())]
    compared, excused = (sum(counts) for counts in zip(*judged, strict=True)) if judged else (0, 0)
    if excused and excused == compared:
        findings.missing("the model's own logits are as good for other tokens everywhere")
    ties = f", {excused} of them as good as the expected ones" if excused else ""
    return findings.result(f"{compared} tokens of {len(rows)} ranks compared{ties}")


def _judge_rank(folder: RunFolder, rank: int, row: EvidenceRow, findings: Findings) -> tuple[int, int]:
    """How many tokens could be compared, and how many of them are others and excused."""
    generated, expected = row["tokens"], row["expected"]
    sequences = folder.scenario.sequences(rank)
    wanted = [folder.scenario.iterations] * sequences
    for name, tokens in (("generated", generated), ("expected", expected)):
        if [len(sequence) for sequence in tokens] != wanted:
            found = f"{len(tokens)} sequences of {sorted({len(sequence) for sequence in tokens})} tokens"
            findings.missing(f"{name}: {found}, not {sequences} of {folder.scenario.iterations}", f"rank {rank}")
            return 0, 0
    excused = 0
    for index, (mine, theirs) in enumerate(zip(generated, expected, strict=True)):
        differing = [at for at, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
        unlike = [at for at in differing if not _as_good(folder, row, index, at)]
        excused += len(differing) - len(unlike)
        if unlike:
            at = unlike[0]
            findings.wrong(f"sequence {index} says {mine[at]} instead of {theirs[at]} at token {at}", f"rank {rank}")
    return sum(wanted), excused


def _as_good(folder: RunFolder, row: EvidenceRow, sequence: int, at: int) -> bool:
    """Whether the other model's logits for both tokens are the same within the tolerance."""
    gap = row["gaps"][sequence][at] if "gaps" in row else None
    return gap is not None and 0 <= gap <= TOLERANCE[folder.scenario.model.dtype]
