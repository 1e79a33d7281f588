"""What a process of a rank must be told before it uses CUDA for the first time. Importable without torch."""

from __future__ import annotations

import os

__all__ = ["CONNECTIONS", "ENOUGH_CONNECTIONS", "GRAPH_MIXING", "prepare_process"]

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
ENOUGH_CONNECTIONS = 32
"""Hardware queues, the most that CUDA gives. Streams that share one run in the order of their launches: a balancer
stream that waits would hold up the model's."""

GRAPH_MIXING = "NCCL_GRAPH_MIXING_SUPPORT"
"""With 1, NCCL's default, it adds nodes to graphs that order its work against work outside of them: they make each of
its kernels begin some us late (https://github.com/NVIDIA/nccl/issues/1901). With 0 it wants no two graphs beside each
other, and none under way when a collective is launched that is not captured: `CudaDevice` keeps to that."""


def prepare_process() -> None:
    """Ask for a hardware queue for each stream, and NCCL for graphs without nodes of its own; what is set stays.

    The nodes stay, too, where torchrun says that ranks are on several machines, which was never tried without.
    """
    os.environ.setdefault(CONNECTIONS, str(ENOUGH_CONNECTIONS))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault(GRAPH_MIXING, "0")
