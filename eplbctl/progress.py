"""Progress on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

import click

from eplbctl.output import say

__all__ = ["Progress"]

_LINES = 4


class Progress:
    """A progress callback for one run, and a context manager that ends the bar."""

    def __init__(self, label: str, unit: str = "iteration") -> None:
        self._label, self._unit = label, unit
        self._bar: Any = None
        self._quarter = 0

    def __call__(self, done: int, total: int) -> None:
        """Tell that `done` of `total` are done."""
        if sys.stderr.isatty():
            self._draw(done, total)
        elif done * _LINES // total > self._quarter:
            self._quarter = done * _LINES // total
            say(f"{self._label}: {self._unit} {done} of {total}", err=True)

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = click.progressbar(length=total, label=self._label, file=sys.stderr)
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
