"""The single examinations of ``eplbctl doctor``."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from eplbctl.finding import Finding, size
from eplbctl.probes_gpu import Probes

if TYPE_CHECKING:
    from moe_eplb.core.scenario import Scenario

__all__ = ["Finding", "diagnose"]

_TORCH_FLOOR = (2, 11)
_RANK_BYTES = 300 << 20
"""Memory of a rank that has done nothing yet: an interpreter with torch loaded."""


def diagnose(path: Path | None, probes: Probes | None = None) -> list[Finding]:
    """Examine everything for the scenario at `path`, or for the one that ``scenario init`` writes.

    `probes` ask this machine about its GPUs.
    """
    from eplbctl.diagnosis_gpu import diagnose_gpus

    scenario = _scenario(path)
    if isinstance(scenario, Finding):
        return [_python(), scenario]
    parts: tuple[Callable[[], Finding], ...] = (_python, _torch, _gloo, _nvtx)
    needs: tuple[Callable[[Scenario], Finding], ...] = (_cores, _memory, _shared_memory)
    machine = [part() for part in parts] + [need(scenario) for need in needs] + [_stale_segments()]
    return machine + diagnose_gpus(scenario, probes or Probes())


def _scenario(path: Path | None) -> Scenario | Finding:
    try:
        from moe_eplb.core import scenario
    except ImportError as error:
        return _not_importable("pydantic, pyyaml, numpy", error, "no scenario can be read")
    if path is not None:
        return scenario.load(path)
    template = resources.files("eplbctl").joinpath("templates", "balance.yaml").read_text(encoding="utf-8")
    return scenario.loads(template, "balance.yaml")


def _python() -> Finding:
    return Finding("python", "ok", platform.python_version())


def _torch() -> Finding:
    torch = _import("torch")
    if isinstance(torch, ImportError):
        return _not_importable("torch", torch, "nothing can run; run folders can still be judged and reported")
    found = str(torch.__version__)
    release = re.match(r"(\d+)\.(\d+)", found)
    if release is None or (int(release[1]), int(release[2])) < _TORCH_FLOOR:
        floor = ".".join(map(str, _TORCH_FLOOR))
        return Finding("torch", "missing", found, f"torch {floor} or newer is needed", f"pip install 'torch>={floor}'")
    return Finding("torch", "ok", found)


def _gloo() -> Finding:
    distributed = _import("torch.distributed")
    if isinstance(distributed, ImportError):
        return _not_importable("gloo", distributed, "ranks cannot talk to each other")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        cost = "ranks cannot talk to each other on a CPU"
        return Finding("gloo", "missing", "torch is built without it", cost, "install a torch wheel from pytorch.org")
    return Finding("gloo", "ok", "built into torch")


def _nvtx() -> Finding:
    nvtx = _import("nvtx")
    if isinstance(nvtx, ImportError):
        return _not_importable("nvtx", nvtx, "no run can be recorded")
    return Finding("nvtx", "ok", "importable")


def _cores(scenario: Scenario) -> Finding:
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} for {scenario.ranks} ranks"
    if cores < scenario.ranks:
        cost = "ranks share cores: results are the same, times mean little"
        return Finding(
            "cores", "warning", found, cost, "use fewer ranks (--ranks) or a larger machine to measure times"
        )
    return Finding("cores", "ok", found)


def _memory(scenario: Scenario) -> Finding:
    free = _available_memory()
    need = scenario.ranks * _RANK_BYTES + 2 * _weight_bytes(scenario)
    found = f"{size(free)} free, about {size(need)} needed"
    if free < need:
        return Finding(
            "memory", "warning", found, "ranks may be killed for want of memory", "use fewer ranks or experts"
        )
    return Finding("memory", "ok", found)


def _shared_memory(scenario: Scenario) -> Finding:
    from moe_eplb.balancer.host_memory import SHM_DIR

    stat = os.statvfs(SHM_DIR)
    free, need = stat.f_bavail * stat.f_frsize, _weight_bytes(scenario)
    found = f"{size(free)} free of {size(stat.f_blocks * stat.f_frsize)}, {size(need)} needed by {scenario.name}"
    if free < need:
        cost = "the host copy of the expert weights does not fit: the run would be refused"
        return Finding(str(SHM_DIR), "missing", found, cost, f"mount -o remount,size={2 * need} {SHM_DIR}")
    return Finding(str(SHM_DIR), "ok", found)


def _stale_segments() -> Finding:
    from moe_eplb.balancer.host_memory import list_segments

    stale = [segment for segment in list_segments() if not segment.alive]
    if stale:
        held = size(sum(segment.bytes for segment in stale))
        return Finding("stale segments", "warning", f"{len(stale)}, {held}", "they hold memory", "eplbctl shm clean")
    return Finding("stale segments", "ok", "none")


def _weight_bytes(scenario: Scenario) -> int:
    """Shared memory for one host copy of all expert weights, which is made only when experts can move."""
    from moe_eplb.core.memory import memory_of

    return memory_of(scenario).shm_bytes


def _available_memory() -> int:
    """Bytes that can be had without swapping, MemAvailable of /proc/meminfo."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _import(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return error


def _not_importable(part: str, error: ImportError, cost: str) -> Finding:
    return Finding(
        part, "missing", str(error), cost, "pip install moe-eplb, or see constraints.txt for tested versions"
    )
