"""A known fault of the reference: what must hold, how our fix is taken out, and what is then said."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from moe_eplb.core.errors import EplbError

__all__ = ["Fault", "demand", "log_lines", "refused", "within"]

LIMIT_S = 2.5
"""Far above the few tenths of a second that bounded waits take in these checks."""


@dataclass(frozen=True)
class Fault:
    """One fault with one way of having it.

    `check` holds on the real code. After `take_out` has replaced our fix by what the reference does, `check` raises an
    `AssertionError` that says `says` (a regular expression).
    """

    name: str
    check: Callable[[], None]
    take_out: Callable[[pytest.MonkeyPatch], None]
    says: str


def demand(met: bool, otherwise: str) -> None:
    """Raise `AssertionError` with the text unless the condition is met."""
    if not met:
        raise AssertionError(otherwise)


def refused(act: Callable[[], object], code: str, what: str) -> EplbError:
    """The error of this code that `act` must raise; `what` was to be refused."""
    try:
        act()
    except EplbError as error:
        demand(error.code == code, f"{what}: refused with {error.code}, not {code}")
        return error
    raise AssertionError(f"{what}: was not refused")


def within(act: Callable[[], object], otherwise: str, *, release: Callable[[], object]) -> BaseException | None:
    """Do `act` on a thread of its own and return what it raised; `AssertionError` when it takes longer than `LIMIT_S`.

    `release`, called again and again, lets an `act` that hangs come to its end, so that nothing stays behind.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if not thread.is_alive():
        return raised[0] if raised else None
    for _ in range(1000):
        release()
        thread.join(0.01)
        if not thread.is_alive():
            break
    raise AssertionError(otherwise)


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Everything that is logged at warning level and above inside the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("moe_eplb")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
