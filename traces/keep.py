"""Puts captures of runs under `eplbctl run --recorder nsys` into `recorded`: redacted, packed with xz, and the run's
own rows beside each.

    python -m traces.keep runs/a-run-folder ...

A capture's name says how the run executed, what overlapped and on how many GPUs, as its scenario has it.
"""

from __future__ import annotations

import lzma
import shutil
import sys
from pathlib import Path

from moe_eplb.core import scenario
from moe_eplb.recording.redact import redact

__all__ = ["keep"]

_RECORDED = Path(__file__).resolve().parent / "recorded"
_PRESET = 9 | lzma.PRESET_EXTREME


def keep(folder: Path, target: Path = _RECORDED) -> list[Path]:
    """Pack a run folder's export and trace; returns the files.

    Raises:
        FileNotFoundError: it has no export, so it was not recorded with Nsight Systems.
        TraceError: E068 one of them cannot be redacted.
    """
    made = []
    name = _name(folder)
    target.mkdir(exist_ok=True)
    for file in ("nsys.sqlite", "trace.sqlite"):
        path = target / f"{name}.{file}"
        shutil.copyfile(folder / file, path)
        redact(path)
        packed = path.with_name(path.name + ".xz")
        with path.open("rb") as source, lzma.open(packed, "wb", preset=_PRESET) as out:
            shutil.copyfileobj(source, out)
        path.unlink()
        made.append(packed)
    return made


def _name(folder: Path) -> str:
    run = scenario.load(folder / "scenario.yaml")
    return f"{run.execution}_{run.overlap}_{run.ranks}gpu"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for kept in keep(Path(argument)):
            print(f"{kept.name}: {kept.stat().st_size} bytes")
