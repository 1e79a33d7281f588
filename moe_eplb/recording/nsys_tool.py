"""Finding Nsight Systems' command line, and whether it runs."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from moe_eplb.core.errors import UsageError

__all__ = ["LIBRARIES_FIX", "Nsys", "find", "look", "missing_library"]

_VENDOR = Path("/opt/nvidia")
_FOLDERS = (
    "nsight-systems*/*/bin/nsys",
    "nsight-systems*/*/target-linux-*/nsys",
    "nsight-systems*/bin/nsys",
    # Nsight Compute carries a complete Nsight Systems inside it.
    "nsight-compute/*/host/target-linux-*/nsys",
)
"""Where installers put it below the vendor's folder, its own places before those within another tool."""
_VERSION_S = 60.0
_MISSING = re.compile(
    r"error while loading shared libraries: ([^\s:]+)|([\w.+-]+\.so[.\d]*): cannot open shared object"
)

LIBRARIES_FIX = (
    "install the library (libdw.so.1 and libelf.so.1 are in the packages libdw1 and libelf1 of Debian and Ubuntu), "
    "or put the folder that holds it on LD_LIBRARY_PATH"
)


@dataclass(frozen=True, slots=True)
class Nsys:
    """One nsys executable: its version, or what keeps it from running."""

    path: Path
    version: str = ""
    problem: str = ""
    fix: str = ""


def look(vendor: Path = _VENDOR) -> list[Nsys]:
    """Every nsys of this machine, in the order in which they would be used: PATH, then its folders, newest first.

    Each is asked for its version, for at most a minute.
    """
    return [_ask(path) for path in _candidates(vendor)]


def find(vendor: Path = _VENDOR) -> Nsys:
    """The first nsys that runs.

    Raises:
        UsageError: E009 there is none, or none of those that there are runs.
    """
    tried = []
    for path in _candidates(vendor):
        tool = _ask(path)
        if not tool.problem:
            return tool
        tried.append(tool)
    if not tried:
        raise UsageError(
            "E009", "the recorder 'nsys' needs Nsight Systems, and there is none",
            why=f"no nsys on PATH, nor in {vendor}/nsight-systems*, nor in {vendor}/nsight-compute",
            hint="install Nsight Systems and put its bin folder on PATH, or use --recorder torch",
        )  # fmt: skip
    why = "; ".join(f"{tool.path}: {tool.problem}" for tool in tried)
    raise UsageError(
        "E009", "the recorder 'nsys' needs Nsight Systems, and it does not run", why=why, hint=tried[0].fix
    )


def missing_library(text: str) -> str:
    """The shared library that a program says it lacks, or ""."""
    match = _MISSING.search(text)
    return (match[1] or match[2]) if match else ""


def _candidates(vendor: Path) -> list[Path]:
    on_path = shutil.which("nsys")
    found = [Path(on_path)] if on_path else []
    for pattern in _FOLDERS:
        paths = [Path(path) for path in glob.glob(str(vendor / pattern))]
        found += sorted((path for path in paths if os.access(path, os.X_OK)), key=_version_key, reverse=True)
    unique = {os.path.realpath(path): path for path in reversed(found)}
    return [path for path in found if unique[os.path.realpath(path)] is path]


def _version_key(path: Path) -> list[list[int]]:
    return [[int(digits) for digits in re.findall(r"\d+", part)] for part in path.parts]


def _ask(path: Path) -> Nsys:
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=_VERSION_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Nsys(path, problem=f"it did not tell its version within {_VERSION_S:g} s", fix="see whether it hangs")
    except OSError as error:
        return Nsys(path, problem=error.strerror or str(error), fix="install one for this machine")
    library = missing_library(answer.stdout)
    if library:
        return Nsys(path, problem=f"the library {library} is missing", fix=LIBRARIES_FIX)
    if answer.returncode != 0:
        told = answer.stdout.strip().splitlines()[-1:]
        return Nsys(path, problem=" ".join([f"it ended with code {answer.returncode}", *told]), fix="install it anew")
    version = re.search(r"\d+\.\d+[\d.]*", answer.stdout)
    return Nsys(path, version=version[0] if version else "unknown")
