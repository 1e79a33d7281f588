"""What a layer did in an iteration, summed over chunks and repeats."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_eplb.checks.equality import Difference
from moe_eplb.checks.layer_evidence import LayerEvidence, OutputEvidence


def _two_chunks() -> LayerEvidence:
    """Chunks of two tokens and of one, top-2; this rank computes expert e in slot e."""
    evidence = LayerEvidence()
    for ids in ([[0, 1], [2, 0]], [[1, 3]]):
        chunk = torch.tensor(ids)
        evidence.add_routed(chunk, np.bincount(chunk.flatten().numpy(), minlength=4))
        token, k = torch.ones_like(chunk).nonzero(as_tuple=True)
        evidence.add_processed(torch.zeros_like(token), token, k, chunk.flatten(), chunk.flatten())
    return evidence


def _arrived(evidence: LayerEvidence) -> Tensor:
    return evidence.rows()[:, 1:]


def test_counts_and_expected_slots_are_sums() -> None:
    evidence = _two_chunks()
    assert evidence.counts(4).tolist() == [2, 2, 1, 1]
    assert evidence.expected is not None
    assert evidence.expected.tolist() == [2, 2, 1, 1]


def test_ids_outside_of_all_experts_are_nobodys() -> None:
    evidence = LayerEvidence()
    evidence.add_routed(torch.tensor([[-1, 4], [0, 9]]), np.zeros(4, dtype=np.int64))
    assert evidence.counts(4).tolist() == [1, 0, 0, 0]


def test_entries_of_all_chunks_arrive_once() -> None:
    evidence = _two_chunks()
    found = evidence.dispatch(_arrived(evidence), slots=4)
    assert (found.expected, found.once, found.first) == (6, 6, "")


def test_an_entry_of_another_chunk_is_not_taken_for_this_ones() -> None:
    evidence = _two_chunks()
    rows = _arrived(evidence)
    rows[4, 0] = 0  # the second chunk's first entry claims to be of the first chunk
    found = evidence.dispatch(rows, slots=4)
    assert (found.once, found.missing, found.duplicated) == (4, 1, 1)


def test_unknown_chunks_and_tokens_are_invalid() -> None:
    evidence = _two_chunks()
    rows = torch.cat((_arrived(evidence), torch.tensor([[2, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])))
    found = evidence.dispatch(rows, slots=4)
    assert (found.once, found.invalid_slot) == (6, 3)


def test_a_layer_that_processed_nothing_has_no_rows() -> None:
    assert LayerEvidence().rows().shape == (0, 6)


def test_the_worst_output_stays_and_tokens_add_up() -> None:
    seen = OutputEvidence()
    for ratio in (1e-7, 3e-7, 2e-7):
        seen.add(Difference(ratio, 1.0, ratio), 4)
    assert (seen.worst.ratio, seen.tokens) == (3e-7, 12)
    seen.add(Difference(1.0, 1.0, float("inf")), 1)
    seen.add(Difference(0.0, 1.0, 0.0), 1)
    assert seen.worst.ratio == float("inf")
