"""What a machine says about its GPUs and what goes with them: each probe asks one thing and judges nothing."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_eplb.recording.nsys_tool import Nsys

__all__ = ["Gpu", "Probes", "SeenByDriver"]

_SMI_S = 30.0
_TOOLKITS = Path("/usr/local")
_CUPTI_PACKAGES = ("nvidia-cuda-cupti", "nvidia-cuda-cupti-cu13", "nvidia-cuda-cupti-cu12")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it: memory in bytes, compute capability as (major, minor)."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SeenByDriver:
    """A GPU as the driver sees it, whether torch can use it or not."""

    name: str
    driver: str
    compute_mode: str


class Probes:
    """The probes of this machine; tests put others in their place."""

    def gpus(self) -> list[Gpu]:
        """What torch can use; empty without torch, without a GPU, and with a driver that is too old for it."""
        cuda = self._torch("cuda")
        if cuda is None:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of an old driver; the driver's version is judged by itself
            found = cuda.device_count() if cuda.is_available() else 0
        properties = [cuda.get_device_properties(index) for index in range(found)]
        return [Gpu(p.name, p.total_memory, (p.major, p.minor)) for p in properties]

    def seen_by_driver(self) -> list[SeenByDriver]:
        """What nvidia-smi lists; empty without it."""
        query = "--query-gpu=name,driver_version,compute_mode"
        lines = self._smi(query, "--format=csv,noheader").splitlines()
        fields = [[field.strip() for field in line.split(",")] for line in lines]
        return [SeenByDriver(*row) for row in fields if len(row) == 3]

    def torch_cuda(self) -> str:
        """The CUDA version that torch was built with, such as ``13.0``; "" for a build without."""
        version = self._torch("version")
        return str(getattr(version, "cuda", None) or "")

    def peer_access(self, count: int) -> list[tuple[int, int]]:
        """Pairs of GPUs that cannot reach each other's memory."""
        cuda = self._torch("cuda")
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        return [pair for pair in pairs if cuda is None or not cuda.can_device_access_peer(*pair)]

    def links(self) -> dict[tuple[int, int], str]:
        """How each pair of GPUs is linked, as ``nvidia-smi topo -m`` writes it (NV18, SYS, PIX, ...)."""
        rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in self._smi("topo", "-m").splitlines()]
        gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row[1:]]
        found = {}
        for a, row in enumerate(gpus):
            for b, link in enumerate(row[1 : len(gpus) + 1]):
                if a != b:
                    found[a, b] = link
        return found

    def nccl(self) -> str:
        """NCCL's version, "" when torch has none."""
        nccl = self._torch("cuda.nccl")
        try:
            version = nccl.version() if nccl is not None else ()
        except (AttributeError, RuntimeError):  # how a build of torch without NCCL says so
            return ""
        return ".".join(str(part) for part in version)

    def nvshmem(self) -> bool:
        """Whether torch's symmetric memory has NVSHMEM."""
        memory = self._torch("distributed._symmetric_memory")
        return memory is not None and bool(memory.is_nvshmem_available())

    def nsys(self) -> list[Nsys]:
        """Every nsys of this machine."""
        from moe_eplb.recording.nsys_tool import look

        return look()

    def cupti(self) -> list[tuple[str, str]]:
        """Where there is a libcupti, and which version."""
        return list(self._cupti())

    def variable(self, name: str) -> str:
        """An environment variable, "" when it is not set."""
        return os.environ.get(name, "")

    def lockable_bytes(self) -> int | None:
        """Bytes of memory that a process may lock (``ulimit -l``), None without a limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft

    def import_error(self, name: str) -> str:
        """Why a module cannot be imported, "" when it can."""
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # a library that a module loads may be missing
            return str(error)
        return ""

    def _torch(self, name: str) -> Any:
        try:
            return importlib.import_module(f"torch.{name}")
        except ImportError:
            return None

    def _smi(self, *arguments: str) -> str:
        try:
            answer = subprocess.run(
                ["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=_SMI_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return answer.stdout if answer.returncode == 0 else ""

    def _cupti(self) -> Iterator[tuple[str, str]]:
        for package in _CUPTI_PACKAGES:
            try:
                yield f"package {package}", metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        for path in sorted(_TOOLKITS.glob("cuda*/version.json")):
            if path.parent.is_symlink():
                continue
            try:
                version = json.loads(path.read_text(encoding="utf-8"))["cuda_cupti"]["version"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a toolkit without CUPTI
            yield str(path.parent), str(version)
