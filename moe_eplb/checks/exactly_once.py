"""Each (token, k) reaches exactly one slot over all ranks, and that slot holds the routed expert.

Judged from what the receiving ranks computed: after an iteration every rank tells each source rank which of its entries
it processed in which slot, and which expert's weights that slot really holds by attestation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DispatchEvidence", "exchange", "tally"]


@dataclass(frozen=True, slots=True)
class DispatchEvidence:
    """Counts over one layer's (token, k) entries of one source rank; `first` describes the first fault."""

    expected: int
    once: int
    missing: int
    duplicated: int
    wrong_expert: int
    invalid_slot: int
    first: str


def exchange(entries: Tensor, destination: Tensor, *, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """Send rows of int64 `entries` [N, F] to the ranks `destination` [N]; the rows that came in."""
    if ranks == 1:
        return entries
    order = torch.argsort(destination, stable=True)
    sends = torch.bincount(destination, minlength=ranks)
    receives = torch.empty_like(sends)
    dist.all_to_all_single(receives, sends, group=group)
    arrived = torch.empty(int(receives.sum()), entries.shape[1], dtype=torch.int64)
    dist.all_to_all_single(arrived, entries[order].contiguous(), receives.tolist(), sends.tolist(), group=group)
    return arrived


def tally(expert_ids: Tensor, processed: Tensor, *, slots: int) -> DispatchEvidence:
    """Compare a source rank's ids [T, K] with the rows (token, k, slot, found expert) that ranks processed for it."""
    tokens, top_k = expert_ids.shape
    token, k, slot, found = processed.unbind(1)
    valid = (token >= 0) & (token < tokens) & (k >= 0) & (k < top_k)
    entry = (token * top_k + k)[valid]
    counts = torch.bincount(entry, minlength=tokens * top_k)
    wanted = expert_ids.reshape(-1).to(torch.int64)
    wrong = wanted[entry] != found[valid]
    invalid = (slot < 0) | (slot >= slots) | ~valid
    return DispatchEvidence(
        expected=tokens * top_k,
        once=int((counts == 1).sum()),
        missing=int((counts == 0).sum()),
        duplicated=int((counts > 1).sum()),
        wrong_expert=int(wrong.sum()),
        invalid_slot=int(invalid.sum()),
        first=_first_fault(counts, wanted, entry, wrong, slot[valid], found[valid], top_k),
    )


def _first_fault(
    counts: Tensor, wanted: Tensor, entry: Tensor, wrong: Tensor, slot: Tensor, found: Tensor, top_k: int
) -> str:
    """The first entry not processed exactly once, or in a slot with another expert; empty if there is none."""
    if bool((counts != 1).any()):
        index = int(torch.nonzero(counts != 1)[0])
        token, k = divmod(index, top_k)
        return f"token {token} k {k} (expert {int(wanted[index])}) processed {int(counts[index])} times"
    if bool(wrong.any()):
        at = int(torch.nonzero(wrong)[0])
        token, k = divmod(int(entry[at]), top_k)
        expert = int(wanted[entry[at]])
        held = f"slot {int(slot[at])}, which holds expert {int(found[at])}"
        return f"token {token} k {k} of expert {expert} was computed in {held}"
    return ""
