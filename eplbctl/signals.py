"""Signals that end the program: the first one unwinds it, so that what it has started and made is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

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
    """From now on the first signal raises `Terminated`. Those after it are left alone: removing takes little time.

    A signal that was ignored when the program started stays so, as ``nohup`` and a shell's ``&`` want it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _listen_in_thread()
        return
    sys.unraisablehook = _unraisable
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # who started the program may have them blocked for itself
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


def _listen_in_thread() -> None:
    """Of torchrun's ranks each ends by itself, and at once: within a collective it would not come to run a handler."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before other threads are made, which then have it too
    threading.Thread(target=_end, name="eplbctl-signals", daemon=True).start()


def _end() -> NoReturn:
    number = signal.sigwait(_SIGNALS)
    memory = sys.modules.get("moe_eplb.balancer.host_memory")
    if memory is not None:
        for segment in memory.list_segments():
            if segment.owner_pid == os.getpid():
                memory.remove_segment(segment.name)
    os._exit(128 + number)


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
    _unwinding = False
    threading.Timer(0.01, os.kill, (os.getpid(), lost.exc_value.number)).start()
