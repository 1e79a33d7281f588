"""A slot is known by the bytes that the kernel reads."""

from __future__ import annotations

import torch

from moe_eplb.checks.attestation import UNKNOWN_EXPERT, SlotAttestation, weight_digest


def master(expert: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((4, 2), float(expert)), "scale": torch.tensor([expert + 0.5])}


def test_digest_covers_every_tensor_its_shape_and_its_dtype() -> None:
    base = weight_digest(master(1))
    assert weight_digest(master(1)) == base
    assert weight_digest(master(1) | {"scale": torch.tensor([1.0])}) != base
    assert weight_digest({"w": master(1)["w"]}) != base
    assert weight_digest(master(1) | {"w": torch.full((2, 4), 1.0)}) != base
    assert weight_digest({"w": torch.zeros(4)}) != weight_digest({"w": torch.zeros(8, dtype=torch.int16)})


def test_one_flipped_bit_is_seen() -> None:
    slots = [{name: t.clone() for name, t in master(e).items()} for e in (2, 0, 2)]
    attestation = SlotAttestation(slots, master, experts=3)
    assert attestation.read() == 3
    assert attestation.mismatches([2, 0, 2]) == []
    slots[1]["w"].view(torch.int32)[3, 1] ^= 1
    assert attestation.read() == 1
    assert attestation.mismatches([2, 0, 2]) == [1]
    assert attestation.expert(1) == UNKNOWN_EXPERT
    assert attestation.expert(0) == 2


def test_fp8_matrices_of_one_expert_with_the_scales_of_another_are_nobodys() -> None:
    def quantized(expert: int) -> dict[str, torch.Tensor]:
        matrix = torch.arange(8.0).view(2, 4).to(torch.float8_e4m3fn)  # the same of both: only the scales tell
        return {"w2": matrix, "w2_scale": torch.tensor([1.0, 2.0]) + expert}

    slots = [quantized(0), quantized(1), quantized(0) | {"w2_scale": quantized(1)["w2_scale"] + 1}]
    attestation = SlotAttestation(slots, quantized, experts=2)
    attestation.read()
    assert [attestation.expert(slot) for slot in range(3)] == [0, 1, UNKNOWN_EXPERT]
    assert attestation.mismatches([0, 0, 0]) == [1, 2]
    slots[0]["w2"].view(torch.uint8)[1, 3] ^= 1
    assert attestation.read() == 1
    assert attestation.expert(0) == UNKNOWN_EXPERT


def test_a_slot_that_holds_another_expert_is_named() -> None:
    slots = [{name: t.clone() for name, t in master(1).items()}]
    attestation = SlotAttestation(slots, master, experts=3)
    attestation.read()
    assert attestation.expert(0) == 1
    assert attestation.mismatches([0]) == [0]
    assert attestation.digest(0) == weight_digest(master(1))
