"""Joining a run whose ranks torchrun (or Slurm through torchrun) has started."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from moe_eplb.balancer.host_memory import clean_segments
from moe_eplb.core.errors import EplbError, ExitCode, RunFailed, UsageError
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.verdict import Verdict
from moe_eplb.session.folder import close_folder, open_folder
from moe_eplb.session.postmortem import last_events
from moe_eplb.session.result import Progress, RunResult

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["joined", "run_joined"]

_LOG = logging.getLogger(__name__)
_NUMBERS = itertools.count()


def joined() -> bool:
    """Whether torchrun started this process as one rank of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def run_joined(
    scenario: Scenario, folder: Path, *, progress: Progress | None = None, argv: Sequence[str] = ()
) -> RunResult | ExitCode:
    """Run as one of torchrun's ranks. Rank 0 judges and gets the result, the others get its exit code.

    All ranks call this equally often, with the same scenarios.
    """
    import torch
    import torch.distributed as dist

    from moe_eplb.device import require_devices
    from moe_eplb.device.environment import prepare_process
    from moe_eplb.session.groups import GroupsBySize
    from moe_eplb.session.rank import run_rank

    started = time.monotonic()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size != scenario.ranks:
        raise UsageError(
            "E012", "torchrun and the scenario disagree about the ranks",
            why=f"torchrun {size}, scenario {scenario.ranks}",
            hint=f"use --nproc-per-node {scenario.ranks}, or --ranks {size}",
        )  # fmt: skip
    torch.set_num_threads(1)
    prepare_process()
    timeout = timedelta(seconds=scenario.timeout_s)
    dist.init_process_group("gloo", store=_next_store(timeout), rank=rank, world_size=size, timeout=timeout)
    try:
        opened = functools.partial(open_folder, folder, scenario, launcher="torchrun", argv=argv)
        if (code := _on_rank_0(opened, rank)) is not ExitCode.VALID:
            return code
        shared = [str(folder)]
        dist.broadcast_object_list(shared, src=0)
        require_devices(scenario.device, int(os.environ.get("LOCAL_WORLD_SIZE", size)), shared=scenario.share_gpus)
        groups = GroupsBySize(scenario.timeout_s).of(size, scenario.fast_backend)
        try:
            run_rank(scenario, Path(shared[0]), rank, groups, _only_rank_0(rank, progress))
            dist.barrier()
        except Exception as error:
            return _failed(scenario, Path(shared[0]), rank, error, started)
        verdicts: list[Verdict] = []
        closed = _on_rank_0(lambda: verdicts.append(close_folder(folder, scenario)), rank)
        code = _agree(verdicts[0].exit_code if verdicts else closed)
    finally:
        dist.destroy_process_group()
    return RunResult(folder, verdicts[0], time.monotonic() - started) if verdicts else code


def _next_store(timeout: timedelta) -> Store:
    """Keys of this run alone: it must not meet the addresses that the ranks had in the run before."""
    from torch.distributed.distributed_c10d import PrefixStore

    store = _store()
    store.set_timeout(timeout)
    return PrefixStore(f"run{next(_NUMBERS)}", store)


@functools.cache
def _store() -> Store:
    """Torchrun's store, or one that rank 0 serves; kept, since its end would end those of later runs too."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://"))[0]
    return store


def _failed(scenario: Scenario, folder: Path, rank: int, error: Exception, started: float) -> RunResult | ExitCode:
    """This rank, or one that it was talking to, has failed: rank 0 judges what is there, torchrun ends the others."""
    _LOG.error("rank %d: %s", rank, error)
    if rank != 0:
        return ExitCode.FAILED
    clean_segments()
    known = RunFailed("E182", "the run failed under torchrun", why=f"rank 0 saw: {error}")
    failure = f"{known}\n{last_events(folder, scenario.ranks)}"
    return RunResult(folder, close_folder(folder, scenario, failure=failure), time.monotonic() - started)


def _on_rank_0(do: Callable[[], None], rank: int) -> ExitCode:
    """Do what rank 0 alone does. Its error ends all ranks: those that waited for it would wait for long."""
    error: EplbError | None = None
    if rank == 0:
        try:
            do()
        except EplbError as raised:
            error = raised
    code = _agree(error.exit_code if error is not None else ExitCode.VALID)
    if error is not None:
        raise error
    return code


def _agree(code: ExitCode) -> ExitCode:
    """Rank 0's exit code on every rank, so that torchrun fails when the verdict does."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor([int(code)], dtype=torch.int64)
    dist.broadcast(shared, src=0)
    return ExitCode(int(shared))


def _only_rank_0(rank: int, progress: Progress | None) -> Progress:
    if rank == 0 and progress is not None:
        return progress
    return lambda done, total: None
