"""What a figure was taken with; nothing that names the machine."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine"]


def machine(module: str, ranks: int = 1) -> dict[str, Any]:
    """Command, GPU, driver and versions, for a benchmark that was started as a module, in so many ranks by torchrun."""
    import triton

    program = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    arguments = [Path(given).name if Path(given).is_absolute() else given for given in sys.argv[1:]]
    return {
        "command": shlex.join([*program, "-m", module, *arguments]),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _driver() -> str | None:
    """Version of the driver, None where no tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
    return told[0].strip() if told else None
