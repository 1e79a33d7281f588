"""Programs started as a terminal starts them."""

from __future__ import annotations

import signal


def restore_defaults() -> None:
    """In a child, before it runs: signals end it, even where these tests have them ignored (``nohup``, ``&``)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])
