"""The log of the plans that a layer drops."""

from __future__ import annotations

import logging

__all__ = ["DropLog", "is_told", "which"]

_LOG = logging.getLogger(__name__)
_FIRST = 4


def is_told(number: int) -> bool:
    """Whether the log tells of what happens the `number`-th time in a row: the first times, then at each power of two.

    A dead updater, or a device that never gets a plan in time, drops one in every turn of every layer.
    """
    return number <= _FIRST or number & (number - 1) == 0


def which(number: int) -> str:
    """What is added to a message of which others before were not told."""
    ending = "nd" if number % 10 == 2 and number % 100 != 12 else "th"  # no power of two above ends otherwise
    return f"; the {number}{ending} in a row" if number > _FIRST else ""


class DropLog:
    """Of one layer.

    Args:
        layer: Its index.
    """

    def __init__(self, layer: int) -> None:
        self._layer, self._in_a_row = layer, 0

    @property
    def tells(self) -> bool:
        """Whether the next plan that is dropped is told."""
        return is_told(self._in_a_row + 1)

    def dropped(self, due: int, iteration: int, reason: str, *, ready: int, ranks: int, differ: bool) -> None:
        """The plan for iteration `due` was given up; `ready` of the ranks had it, and its digests may `differ`."""
        if self.tells:
            _LOG.error(
                "layer %d: plan for iteration %d dropped in iteration %d: %s (ready on %d of %d ranks%s)%s",
                self._layer, due, iteration, reason, ready, ranks, ", digests differ" if differ else "",
                which(self._in_a_row + 1),
            )  # fmt: skip
        self._in_a_row += 1

    def committed(self) -> None:
        """A plan was committed."""
        self._in_a_row = 0
