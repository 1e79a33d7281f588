"""A rank process of the pool: waits for jobs, runs each, answers."""

from __future__ import annotations

import datetime
import os
import shutil
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import parent_process, util
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import EplbError, RunFailed
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import require_devices
from moe_eplb.device.environment import prepare_process
from moe_eplb.session.bench import run_bench
from moe_eplb.session.groups import Groups, GroupsBySize
from moe_eplb.session.messages import Done, Failed, Job, Message, Step
from moe_eplb.session.rank import run_rank
from moe_eplb.session.result import Progress
from moe_eplb.session.samples import variant_path
from moe_eplb.session.unnamed_file import UnnamedFile

__all__ = ["main"]

_STORE_TIMEOUT = datetime.timedelta(seconds=120)


def main(rank: int, size: int, store: UnnamedFile, pipe: Connection) -> None:
    """Serve jobs until the parent says stop or is gone."""
    threading.Thread(target=_end_with_parent, name="moe_eplb-parent-watch", daemon=True).start()
    torch.set_num_threads(1)
    prepare_process()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A path that is always there: torch looks minutes for one that is not, and lets no other thread run meanwhile.
    method = f"file://{store.path}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=_STORE_TIMEOUT)
    groups = GroupsBySize()
    while (job := _next_job(pipe)) is not None:
        pipe.send(_answer(job, rank, groups, pipe))
    dist.destroy_process_group()


def _answer(job: Job, rank: int, groups: GroupsBySize, pipe: Connection) -> Message:
    try:
        variants = _variants(job)
        scenario = variants[0]
        require_devices(scenario.device, scenario.ranks, shared=scenario.share_gpus)
        members: Groups = groups.of(scenario.ranks, scenario.fast_backend)
        if rank < scenario.ranks:
            _do(job, variants, rank, members, lambda done, total: pipe.send(Step(done, total)))
    except EplbError as error:
        return Failed(error)
    except OSError as error:  # such as a full disk
        return Failed(RunFailed("E183", "a file could not be used", why=str(error)))
    except Exception:  # the parent reports it: a rank's traceback must not vanish with its process
        return Failed(traceback.format_exc())
    return Done()


def _variants(job: Job) -> list[Scenario]:
    """The scenarios of a job, one unless they are compared."""
    folder = Path(job.folder)
    paths = [variant_path(folder, number) for number in range(job.variants)] or [folder / "scenario.yaml"]
    return [scenarios.loads(path.read_text(encoding="utf-8"), str(path)) for path in paths]


def _do(job: Job, variants: Sequence[Scenario], rank: int, groups: Groups, on_step: Progress) -> None:
    folder = Path(job.folder)
    if job.timing is None:
        run_rank(variants[0], folder, rank, groups, on_step)
    else:
        run_bench(variants, job.timing, folder, rank, groups, on_step)


def _next_job(pipe: Connection) -> Job | None:
    try:
        job: Job | None = pipe.recv()
    except EOFError:
        return None
    return job


def _end_with_parent() -> None:
    """Leave at once when the parent is gone: nobody would end a rank that hangs in a collective.

    A parent that was killed has left the folder of the server's socket, which is the ranks' too.
    """
    parent = parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(util.get_temp_dir(), ignore_errors=True)
        os._exit(1)
