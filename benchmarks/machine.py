"""Where and with what a figure was taken."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["machine"]


def machine() -> dict[str, Any]:
    """Processor, cores and versions; nothing that names the machine."""
    versions = {name: metadata.version(name) for name in ("numpy", "nvtx", "torch")}
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.machine()
