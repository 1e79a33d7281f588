"""What a figure was taken with, and where it goes; nothing that names the machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from moe_eplb.device.environment import CONNECTIONS, GRAPH_MIXING

__all__ = ["machine", "require_gpus", "write"]


def require_gpus(count: int = 1) -> None:
    """End with code 2 where torch has fewer GPUs."""
    if torch.cuda.device_count() < count:
        lacking = "there is no GPU for torch on this machine" if count == 1 else f"{count} GPUs are needed"
        click.echo(f"{lacking}: nothing was timed", err=True)
        raise SystemExit(2)


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Put the figures, with their raw samples, into a JSON file."""
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine(module: str, ranks: int = 1) -> dict[str, Any]:
    """Command, GPU, driver, versions and what CUDA and NCCL are asked for, of a benchmark that was started as a module.

    `ranks`: As many as torchrun has started.
    """
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
        "environment": {name: os.environ.get(name) for name in (CONNECTIONS, GRAPH_MIXING)},
    }


def _driver() -> str | None:
    """Version of the driver, None where no tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.splitlines()
    return told[0].strip() if told else None
