"""The examinations of ``eplbctl doctor`` on a machine with GPUs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from eplbctl.finding import Finding, State, size

if TYPE_CHECKING:
    from eplbctl.probes_gpu import Gpu, Probes, SeenByDriver
    from moe_eplb.core.scenario import Scenario

__all__ = ["diagnose_gpus"]

_CAPABILITY = (9, 0)
"""What the figures of this project were measured on."""
_DRIVER_FOR_CUDA = {"13": 580, "12": 525}
"""The oldest driver branch that each major version of CUDA runs on."""
_BAD_CUPTI = "13.0.48"
_GOOD_CUPTI = "13.0.85"
_SMALL_LOCK = 1 << 30


def diagnose_gpus(scenario: Scenario, probes: Probes) -> list[Finding]:
    """Examine the GPUs and what goes with them; without any, one finding says so."""
    gpus, driver = probes.gpus(), probes.seen_by_driver()
    if not gpus:
        return list(_no_gpu(scenario, driver, probes.torch_cuda()))
    return list(_gpus(scenario, gpus, driver, probes))


def _no_gpu(scenario: Scenario, driver: list[SeenByDriver], cuda: str) -> Iterator[Finding]:
    cost = "device: cuda does not run" if scenario.device == "cuda" else ""
    if not driver:
        fix = "use --device cpu, or a machine with GPUs" if cost else ""
        yield Finding("GPU", "warning" if cost else "ok", "none", cost, fix)
        return
    yield Finding(
        "GPU", "warning", f"{_counted([gpu.name for gpu in driver])}, none of them usable by torch",
        "nothing runs on them", "mend driver and torch, below; CUDA_VISIBLE_DEVICES may hide them too",
    )  # fmt: skip
    yield from _driver(driver, cuda)


def _gpus(scenario: Scenario, gpus: list[Gpu], driver: list[SeenByDriver], probes: Probes) -> Iterator[Finding]:
    yield _gpu(scenario, gpus)
    yield from _driver(driver, probes.torch_cuda())
    yield from _compute_mode(driver, scenario)
    if len(gpus) > 1:
        yield _links(len(gpus), probes)
    yield _nccl(len(gpus), scenario, probes)
    yield _nvshmem(probes)
    yield _connections(probes)
    if len(gpus) > 1:
        yield _graph_mixing(probes)
    yield _lockable(probes)
    cost = "nothing runs on a GPU: the operations there are Triton kernels"
    yield _module("triton", "triton", cost, _needed(scenario), "triton>=3.6", probes)
    cost = "waits and writes of streams, by which GPU and CPU hand over without a thread that polls, cannot be had"
    yield _module("cuda-bindings", "cuda.bindings.driver", cost, "warning", "cuda-bindings>=13", probes)
    yield _nsys(probes)
    yield _cupti(probes)


def _gpu(scenario: Scenario, gpus: list[Gpu]) -> Finding:
    names = _counted([f"{gpu.name}, {size(gpu.memory)}, {_dotted(gpu.capability)}" for gpu in gpus])
    if scenario.device == "cuda" and scenario.ranks > len(gpus):
        cost = f"each of the {scenario.ranks} ranks needs a GPU of its own"
        return Finding("GPU", "missing", names, cost, f"use --ranks {len(gpus)}, or a machine with more")
    oldest = min(gpu.capability for gpu in gpus)
    if oldest < _CAPABILITY:
        cost = f"times differ from the documented ones, which were taken on capability {_dotted(_CAPABILITY)}"
        return Finding("GPU", "warning", names, cost, "results are right; take times on a newer GPU")
    return Finding("GPU", "ok", names)


def _driver(driver: list[SeenByDriver], cuda: str) -> Iterator[Finding]:
    if not driver:
        cost = "driver, compute mode and links cannot be told"
        yield Finding("driver", "warning", "nvidia-smi does not answer", cost, "put nvidia-smi on PATH")
        return
    found = driver[0].driver
    if not cuda:
        cost = "torch is built without CUDA and sees no GPU"
        yield Finding("driver", "warning", found, cost, "install a torch wheel for CUDA from pytorch.org")
        return
    branch, needed = re.match(r"\d+", found), _DRIVER_FOR_CUDA.get(cuda.partition(".")[0])
    if branch and needed and int(branch[0]) < needed:
        cost = f"torch is built for CUDA {cuda}, which needs driver {needed} or newer: it sees no GPU"
        yield Finding("driver", "warning", found, cost, "update the driver, or install a torch wheel for an older CUDA")
        return
    yield Finding("driver", "ok", f"{found}, torch for CUDA {cuda}")


def _compute_mode(driver: list[SeenByDriver], scenario: Scenario) -> Iterator[Finding]:
    modes = sorted({gpu.compute_mode for gpu in driver})
    if not modes:
        return
    found, fix = ", ".join(modes), "sudo nvidia-smi -c DEFAULT"
    if "Prohibited" in modes:
        yield Finding("compute mode", _needed(scenario), found, "no process may use such a GPU", fix)
    elif modes != ["Default"]:
        cost = "one process a GPU: a second one, such as that of another job, makes a run fail at its start"
        yield Finding("compute mode", "warning", found, cost, fix)
    else:
        yield Finding("compute mode", "ok", found)


def _needed(scenario: Scenario) -> State:
    """The state of what is not there and what nothing runs without on a GPU."""
    return "missing" if scenario.device == "cuda" else "warning"


def _links(count: int, probes: Probes) -> Finding:
    apart, links = probes.peer_access(count), probes.links()
    kinds = ", ".join(sorted(set(links.values()))) or "not told by nvidia-smi"
    if apart:
        cost = "experts move between these GPUs, and tokens go, through host memory"
        pairs = ", ".join(f"{a} and {b}" for a, b in sorted({(min(pair), max(pair)) for pair in apart}))
        found = f"no peer access between {pairs}; {kinds}"
        return Finding(
            "GPU links", "warning", found, cost, "see `nvidia-smi topo -m`; in a container allow peer access"
        )
    if not links or not all(link.startswith("NV") for link in links.values()):
        cost = "peer copies and dispatch go over PCIe, far below the rate of NVLink"
        return Finding("GPU links", "warning", kinds, cost, "use GPUs that NVLink joins; see `nvidia-smi topo -m`")
    return Finding("GPU links", "ok", f"NVLink ({kinds})")


def _nccl(count: int, scenario: Scenario, probes: Probes) -> Finding:
    version = probes.nccl()
    if version:
        return Finding("NCCL", "ok", version)
    cost = "ranks cannot talk to each other on GPUs" if count > 1 else "one GPU can be used, more cannot"
    state = _needed(scenario) if count > 1 else "warning"
    return Finding("NCCL", state, "torch is built without it", cost, "install a torch wheel for CUDA from pytorch.org")


def _nvshmem(probes: Probes) -> Finding:
    if probes.nvshmem():
        return Finding("NVSHMEM", "ok", "in torch's symmetric memory")
    cost = "dispatch: symm_mem is refused; alltoall and allgather over NCCL work"
    return Finding("NVSHMEM", "warning", "none", cost, "install a torch wheel with it, and nvidia-nvshmem-cu13")


def _connections(probes: Probes) -> Finding:
    from moe_eplb.core.events import STREAMS
    from moe_eplb.device.environment import CONNECTIONS, ENOUGH_CONNECTIONS

    value = probes.variable(CONNECTIONS)
    # The communicators of dispatch and of statistics have one each; the last of ours is for `overlap: before` alone.
    needed = len(STREAMS) - 1 + 2
    fix = f"unset {CONNECTIONS}: ranks then ask for {ENOUGH_CONNECTIONS}"
    if not value:
        return Finding(CONNECTIONS, "ok", f"not set: ranks ask for {ENOUGH_CONNECTIONS}")
    if not value.isdecimal():
        return Finding(CONNECTIONS, "warning", value, "it is no number and is not obeyed", fix)
    if int(value) < needed:
        cost = f"{needed} streams share {value} hardware queues: one that waits blocks another that could run"
        return Finding(CONNECTIONS, "warning", value, cost, fix)
    return Finding(CONNECTIONS, "ok", value)


def _graph_mixing(probes: Probes) -> Finding:
    from moe_eplb.device.environment import GRAPH_MIXING

    value = probes.variable(GRAPH_MIXING)
    if value in ("", "0"):
        return Finding(GRAPH_MIXING, "ok", value or "not set: ranks ask for 0 where all are on one machine")
    cost = "NCCL adds nodes of its own to graphs, after which its kernels begin late: only several machines need them"
    return Finding(GRAPH_MIXING, "warning", value, cost, f"unset {GRAPH_MIXING}")


def _lockable(probes: Probes) -> Finding:
    limit = probes.lockable_bytes()
    if limit is None:
        return Finding("locked memory", "ok", "no limit")
    if limit < _SMALL_LOCK:
        cost = "pinned staging and registered host weights may be refused, above all by NVSHMEM and RDMA"
        fix = "ulimit -l unlimited; in a container --ulimit memlock=-1"
        return Finding("locked memory", "warning", f"at most {size(limit)}", cost, fix)
    return Finding("locked memory", "ok", f"at most {size(limit)}")


def _module(part: str, module: str, cost: str, state: State, package: str, probes: Probes) -> Finding:
    error = probes.import_error(module)
    if error:
        return Finding(part, state, error, cost, f"pip install '{package}'")
    return Finding(part, "ok", "importable")


def _nsys(probes: Probes) -> Finding:
    tools = probes.nsys()
    running = [tool for tool in tools if not tool.problem]
    if running:
        return Finding("nsys", "ok", f"{running[0].version}, {running[0].path}")
    cost = "record: {recorder: nsys} is refused; builtin and torch record"
    if not tools:
        fix = "install Nsight Systems, or Nsight Compute, which carries it"
        return Finding("nsys", "warning", "not found on PATH and in /opt/nvidia", cost, fix)
    return Finding("nsys", "warning", f"{tools[0].path}: {tools[0].problem}", cost, tools[0].fix)


def _cupti(probes: Probes) -> Finding:
    copies = probes.cupti()
    found = ", ".join(f"{version} ({place})" for place, version in copies) or "none found"
    bad = [place for place, version in copies if version == _BAD_CUPTI]
    if not bad:
        return Finding("libcupti", "ok", found)
    cost = f"{_BAD_CUPTI} crashes a process that it is loaded into to record NVTX ({', '.join(bad)})"
    injected = probes.variable("NVTX_INJECTION64_PATH")
    if injected and any(injected.startswith(place) for place in bad):
        return Finding("libcupti", "missing", found, f"{cost}, and NVTX_INJECTION64_PATH names it", "unset it")
    return Finding(
        "libcupti", "warning", found, cost, f"pip install 'nvidia-cuda-cupti=={_GOOD_CUPTI}' and use that copy"
    )


def _counted(names: list[str]) -> str:
    return "; ".join(f"{count} x {name}" for name, count in Counter(names).items())


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
