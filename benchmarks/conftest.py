"""What every result of the benchmarks says about where it comes from."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from benchmarks.machine import machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the plugin's description, which names the machine, by ours."""
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add the command."""
    output_json["command"] = shlex.join(["pytest", *sys.argv[1:]])
