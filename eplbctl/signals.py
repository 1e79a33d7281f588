"""Signals that end the program: the first one unwinds it, so that what it has started and made is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

__all__ = ["Terminated", "held", "ignore", "listen", "released"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """Raised in the main thread by the first signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells report it."""
        return 128 + self.number


_unwinding = False


def listen() -> None:
    """From now on the first signal raises `Terminated`. Those after it are left alone: removing takes little time."""
    # torchrun ends its ranks by itself, and a rank within a collective would not come to run a handler.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    sys.unraisablehook = _unraisable
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _raise)


def ignore() -> None:
    """The work is done and its result stands."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """No signal gets through until the end, so that nothing is made without being known to who removes it."""
    with _masked(signal.SIG_BLOCK):
        yield


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Within `held`: signals get through, since whatever they interrupt is removed by what surrounds it."""
    with _masked(signal.SIG_UNBLOCK):
        yield


@contextlib.contextmanager
def _masked(how: int) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(how, _SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise(number: int, frame: FrameType | None) -> None:
    global _unwinding
    if not _unwinding:
        _unwinding = True
        raise Terminated(number)


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again that came where Python cannot pass an exception on, such as in ``__del__``."""
    global _unwinding
    if not isinstance(lost.exc_value, Terminated):
        sys.__unraisablehook__(lost)
        return
    import threading

    _unwinding = False
    threading.Timer(0.01, os.kill, (os.getpid(), lost.exc_value.number)).start()
