"""All ranks commit the same plan or none: five integers that ride in a sum over ranks that is made anyway.

A sum cannot carry a minimum and a maximum, but it can tell whether all summands are equal: by Cauchy-Schwarz
``R * sum(d*d) == sum(d)**2`` holds for integers exactly when every d is the same. The digest rides as two pieces of
20 bits, so that squares summed over 4096 ranks stay within int64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LANES", "Outcome", "lane_values", "lanes", "outcome", "plan_digest"]

LANES = 5
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many ranks had the plan ready, and whether the ready ranks' digests differ."""

    ready: int
    digests_differ: bool


def plan_digest(layer: int, due: int, placement_digest: int) -> int:
    """A digest in [0, 2**40) of which placement is to be committed, where and when."""
    text = f"{layer} {due} {placement_digest}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=5).digest(), "little")


def lane_values(digest: int | None) -> tuple[int, int, int, int, int]:
    """The lanes of this rank: with a digest it is ready, with None it has no plan ready."""
    if digest is None:
        return 0, 0, 0, 0, 0
    high, low = divmod(digest, _PIECE)
    return 1, high, high * high, low, low * low


def lanes(digest: int | None) -> Tensor:
    """int64 [LANES], `lane_values` as a tensor."""
    return torch.tensor(lane_values(digest), dtype=torch.int64)


def outcome(summed: Tensor) -> Outcome:
    """Read the sum over ranks of `lanes`."""
    ready, high, high2, low, low2 = (int(value) for value in summed)
    differ = ready * high2 != high * high or ready * low2 != low * low
    return Outcome(ready, differ)
