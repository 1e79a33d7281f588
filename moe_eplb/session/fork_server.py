"""The server that forks the ranks: started deaf to what ends a terminal's whole group, and ended while it is busy."""

from __future__ import annotations

import os
import signal
from multiprocessing import forkserver, resource_tracker
from typing import Any

__all__ = ["start", "stop"]


def start() -> None:
    """Start it, from a thread that does nothing but starting: signals stay blocked in it.

    A server that went first, as signals to a terminal's group would have it, would leave dying ranks that nobody can
    wait for, and their memory. This process answers for all.
    """
    resource_tracker.ensure_running()  # first, since starting it would lift the block
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    forkserver.ensure_running()


def stop() -> None:
    """Kill it, even while it imports what the ranks need; it would notice the end of this process only after that."""
    server: Any = forkserver._forkserver  # Python has no public way to end it
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
