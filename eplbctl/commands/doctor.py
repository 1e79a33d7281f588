"""``eplbctl doctor``: whether this machine has what runs need, what each lack costs, and how to mend it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, format_option, output_options
from moe_eplb.core.errors import ExitCode

if TYPE_CHECKING:
    from eplbctl.finding import Finding

__all__ = ["command"]


@click.command()
@click.argument("scenario", required=False, type=PATH)
@format_option("text", "json")
@output_options
def command(scenario: Path | None, form: str, destination: Destination) -> ExitCode:
    """Look at python, torch, gloo, nvtx, cores, memory, /dev/shm and GPUs.

    On a machine with GPUs also at driver, compute mode, links between GPUs, NCCL, NVSHMEM, hardware queues, locked
    memory, triton, cuda-bindings, nsys and libcupti. With SCENARIO the needs are those of this scenario. Exit code 0:
    runs will work, though warnings may make them slower; 1: something that every run needs is missing.
    """
    from eplbctl import diagnosis

    findings = diagnosis.diagnose(scenario)
    if form == "json":
        destination.write(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        destination.write(_text(findings))
    missing = any(finding.state == "missing" for finding in findings)
    return ExitCode.INVALID if missing else ExitCode.VALID


def _text(findings: list[Finding]) -> str:
    from eplbctl.render.text import table

    parts = [table(("part", "state", "found"), [(f.part, f.state, f.found) for f in findings])]
    for finding in findings:
        if finding.state != "ok":
            parts.append(f"{finding.part}: {finding.cost}\n  fix: {finding.fix}")
    return "\n\n".join(parts)
