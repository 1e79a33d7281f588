"""What a process of a rank must be told before it uses CUDA for the first time. Importable without torch."""

from __future__ import annotations

import os

__all__ = ["CONNECTIONS", "ENOUGH_CONNECTIONS", "prepare_process"]

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ENOUGH_CONNECTIONS = 32
"""Hardware queues, the most that CUDA gives. Streams that share one run in the order of their launches: a balancer
stream that waits would hold up the model's."""


def prepare_process() -> None:
    """Ask for a hardware queue for each stream, unless the user has asked for a number of them."""
    os.environ.setdefault(CONNECTIONS, str(ENOUGH_CONNECTIONS))
