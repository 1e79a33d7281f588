"""Runs a function on several ranks that talk over gloo, each in a process of its own, with a hard limit on the time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["RankError", "run_ranks"]

_PRELOAD = ["torch", "torch.distributed", "numpy"]


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call ``fn(rank, size, *args)`` on `size` ranks of an initialised gloo group; return their results by rank.

    `fn` is a function of a module. Results are copied, tensors included. When a rank fails or `timeout` seconds pass,
    all ranks are killed and `RankError` carries the first failing rank's traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pipes: list[Connection] = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(theirs, fn, rank, size, f"{folder}/store", timeout, args), daemon=True
            )
            process.start()
            theirs.close()
            stack.callback(_end, process)
            pipes.append(stack.enter_context(ours))
        return _collect(pipes, time.monotonic() + timeout)


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        missing = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {[r for r in range(len(pipes)) if r not in results]} did not finish in time")
        for pipe in missing:
            if pipe in ready:
                rank = pipes.index(pipe)
                results[rank] = _receive(rank, pipe)
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection) -> Any:
    try:
        failed, payload = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} died") from None
    if failed:
        raise RankError(f"rank {rank}: {payload}")
    return payload


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
    process.close()


def _rank_main(
    pipe: Connection, fn: Callable[..., Any], rank: int, size: int, store: str, timeout: float, args: tuple[Any, ...]
) -> None:
    try:
        with _group(rank, size, store, timeout):
            _send(pipe, failed=False, payload=fn(rank, size, *args))
    except BaseException:
        _send(pipe, failed=True, payload=traceback.format_exc())
        # Leaving would break the other ranks' connections, and their errors would hide this one. The parent kills all.
        time.sleep(timeout)


def _send(pipe: Connection, *, failed: bool, payload: Any) -> None:
    # Plain pickle copies tensors; the pipe's own way would share memory that dies with this process.
    pipe.send_bytes(pickle.dumps((failed, payload)))


@contextlib.contextmanager
def _group(rank: int, size: int, store: str, timeout: float) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    yield
    dist.destroy_process_group()
