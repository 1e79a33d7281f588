"""Which part of a capture is asked for: some ranks, iterations and layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import Table
from moe_eplb.analysis.grouping import known_numbers
from moe_eplb.core.errors import UsageError

__all__ = ["EVERYTHING", "Selection", "parse_numbers"]

_PART = re.compile(r"\s*([0-9]{1,9})\s*(?:(-)\s*([0-9]{1,9})?\s*)?")
_OPEN = (1 << 31) - 1

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """First and last number of each range that is asked for; None is everything, what belongs to none included."""

    ranks: Ranges | None = None
    iterations: Ranges | None = None
    layers: Ranges | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self.ranks is None and self.iterations is None and self.layers is None

    def mask(self, rank: NDArray[Any], iteration: NDArray[Any], layer: NDArray[Any]) -> NDArray[np.bool_]:
        """What is asked for [N], of things with a rank, an iteration and a layer."""
        chosen = np.ones(len(rank), np.bool_)
        for wanted, numbers in ((self.ranks, rank), (self.iterations, iteration), (self.layers, layer)):
            if wanted is not None:
                chosen &= np.logical_or.reduce([(numbers >= first) & (numbers <= last) for first, last in wanted])
        return chosen

    def has_rank(self, rank: int) -> bool:
        """Whether a rank is asked for."""
        return _has(self.ranks, rank)

    def has_iteration(self, iteration: int) -> bool:
        """Whether an iteration is asked for."""
        return _has(self.iterations, iteration)

    def require_some(self, gpu: Table, where: str) -> None:
        """Refuse to select nothing of a trace that has GPU events: what is said of nothing looks like a good result.

        Raises:
            UsageError: E080 no GPU event is asked for.
        """
        if not len(gpu) or self.mask(gpu["rank"], gpu["iteration"], gpu["layer"]).any():
            return
        why = "the trace has each of them, but not together"
        for name, only in self._parts():
            if not only.mask(gpu["rank"], gpu["iteration"], gpu["layer"]).any():
                numbers = known_numbers(gpu[name.removesuffix("s")])
                why = f"its {name} are {numbers[0]} to {numbers[-1]}" if numbers else f"it names no {name}"
                break
        hint = "eplbctl trace info says what a trace holds"
        raise UsageError("E080", f"nothing in the trace has {self}", why=why, where=where, hint=hint)

    def _parts(self) -> Iterator[tuple[str, Selection]]:
        yield "ranks", Selection(ranks=self.ranks)
        yield "iterations", Selection(iterations=self.iterations)
        yield "layers", Selection(layers=self.layers)

    def __str__(self) -> str:
        named = (("ranks", self.ranks), ("iterations", self.iterations), ("layers", self.layers))
        return ", ".join(f"{name} {_text(wanted)}" for name, wanted in named if wanted is not None)


EVERYTHING = Selection()


def parse_numbers(text: str, what: str) -> Ranges:
    """Ranges as users write them: ``3``, ``0-7``, ``5-`` and several of them with commas.

    Raises:
        UsageError: E080 the text is something else, or a range ends before it begins.
    """
    found = []
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            hint = "write numbers and ranges, such as 3 or 0-7,12 or 5-"
            raise UsageError("E080", f"{what} {text[:60]!r} does not parse", why=f"at {part[:30]!r}", hint=hint)
        first = int(match[1])
        last = int(match[3]) if match[3] else _OPEN if match[2] else first
        if last < first:
            raise UsageError("E080", f"{what} {text[:60]!r} is empty", why=f"{last} comes before {first}")
        found.append((first, last))
    return tuple(found)


def _has(wanted: Ranges | None, number: int) -> bool:
    return wanted is None or any(first <= number <= last for first, last in wanted)


def _text(wanted: Ranges) -> str:
    return ",".join(str(a) if a == b else f"{a}-" if b == _OPEN else f"{a}-{b}" for a, b in wanted)
