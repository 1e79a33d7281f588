"""Exposed balancer work by layer and iteration, small enough to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.overlap import PAIRS, Hidden, measure
from moe_eplb.analysis.work import work_of_capture

__all__ = ["Heat", "heat_map"]

MOST_COLUMNS, MOST_ROWS = 240, 256


@dataclass(frozen=True)
class Heat:
    """Exposed and all balancer work, summed over ranks, of each layer in each iteration.

    Attributes:
        layers: First and last layer of each row; -1 is work that belongs to no layer.
        iterations: First and last iteration of each column.
        total_ns, exposed_ns: Numbers [rows][columns], None where there was no work.
        note: What was put together to keep it small, in words.
    """

    layers: tuple[tuple[int, int], ...] = ()
    iterations: tuple[tuple[int, int], ...] = ()
    total_ns: tuple[tuple[int | None, ...], ...] = ()
    exposed_ns: tuple[tuple[int | None, ...], ...] = ()
    note: str = ""


def heat_map(capture: Capture, only: NDArray[np.bool_] | None = None) -> Heat:
    """The map of a capture with roles; empty where no balancer work belongs to an iteration.

    Args:
        only: Mask [N] of the GPU events that are asked about.
    """
    lasting = capture.gpu["end"] > capture.gpu["start"]
    chosen = None if only is None else only[lasting]
    cells = measure(work_of_capture(capture), PAIRS["balancer"], chosen).cells
    known = {key[1:]: Hidden() for key in cells if key[1] >= 0}
    for (_, *place), hidden in cells.items():
        if tuple(place) in known:
            known[tuple(place)] += hidden
    iterations, iteration_of = _grouped(sorted({i for i, _ in known}), MOST_COLUMNS)
    layers, layer_of = _grouped(sorted({layer for _, layer in known}), MOST_ROWS)
    sums: dict[tuple[int, int], Hidden] = {}
    for (iteration, layer), hidden in known.items():
        at = layer_of[layer], iteration_of[iteration]
        sums[at] = sums.get(at, Hidden()) + hidden
    return Heat(
        layers, iterations, _table(sums, len(layers), len(iterations), "total"),
        _table(sums, len(layers), len(iterations), "exposed"), _note(layers, iterations),
    )  # fmt: skip


def _grouped(numbers: list[int], most: int) -> tuple[tuple[tuple[int, int], ...], dict[int, int]]:
    """Groups of neighbouring numbers, at most so many, and the group of each number."""
    size = -(-len(numbers) // most) or 1
    groups = [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return tuple((g[0], g[-1]) for g in groups), {number: at for at, g in enumerate(groups) for number in g}


def _table(
    sums: dict[tuple[int, int], Hidden], rows: int, columns: int, what: str
) -> tuple[tuple[int | None, ...], ...]:
    return tuple(
        tuple(getattr(sums[at], what) if (at := (row, column)) in sums else None for column in range(columns))
        for row in range(rows)
    )


def _note(layers: tuple[tuple[int, int], ...], iterations: tuple[tuple[int, int], ...]) -> str:
    parts = [
        f"each {line} of the map is the sum of several {what}"
        for line, what, groups in (("row", "layers", layers), ("column", "iterations", iterations))
        if any(first != last for first, last in groups)
    ]
    return "; ".join(parts)
