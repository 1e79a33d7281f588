"""Which expert a slot really holds: digests of the bytes that the kernel reads, against the master weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["UNKNOWN_EXPERT", "SlotAttestation", "weight_digest"]

UNKNOWN_EXPERT = -1
"""A slot whose contents equal no expert's master weights."""


def weight_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest over names, shapes, dtypes and bytes of all tensors of one expert or slot."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class SlotAttestation:
    """Digests of one layer's local slots, read back from the storage handed to the kernel.

    Args:
        slots: For each local slot, the tensors by name that the kernel reads.
        master: The master weights by expert, from which nothing is ever copied into a slot by this class.
        experts: E.
    """

    def __init__(
        self,
        slots: Sequence[Mapping[str, Tensor]],
        master: Callable[[int], Mapping[str, Tensor]],
        experts: int,
    ) -> None:
        self._slots = slots
        self._expert_of = {weight_digest(master(expert)): expert for expert in range(experts)}
        self._found: list[str] = []

    def read(self) -> int:
        """Read all slots back; how many differ from the reading before (all, the first time)."""
        found = [weight_digest(weights) for weights in self._slots]
        before = self._found or [""] * len(found)
        self._found = found
        return sum(a != b for a, b in zip(found, before, strict=True))

    def expert(self, local_slot: int) -> int:
        """The expert whose master weights the slot held at the last reading, or `UNKNOWN_EXPERT`."""
        return self._expert_of.get(self._found[local_slot], UNKNOWN_EXPERT)

    def digest(self, local_slot: int) -> str:
        """The digest of the slot's contents at the last reading."""
        return self._found[local_slot]

    def mismatches(self, expected: Sequence[int]) -> list[int]:
        """Local slots that do not hold the expected expert."""
        return [slot for slot, expert in enumerate(expected) if self.expert(slot) != expert]
