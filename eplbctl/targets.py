"""From paths on a command line to scenarios and run folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe_eplb.core.errors import ScenarioError, UsageError

if TYPE_CHECKING:
    from moe_eplb.core.scenario import Scenario

__all__ = ["Target", "is_run_folder", "load_all", "select", "targets"]

_SUFFIXES = (".yaml", ".yml")
_LEFT_BY_RUNS = ("events.rank*.bin", "evidence.rank*.jsonl", "trace.sqlite", "verdict.json")
DATA_FOLDER = "data"
"""Name of folders that hold what scenarios read, which may be YAML too; no search goes into them."""


@dataclass(frozen=True)
class Target:
    """A scenario file, or a run folder, which has been run already."""

    path: Path
    finished: bool

    @property
    def name(self) -> str:
        """What --select and --exclude match: the file's name without its suffix, or the folder's name."""
        return self.path.resolve().name if self.finished else self.path.stem


def is_run_folder(path: Path) -> bool:
    """Whether a run wrote this folder, or what is left of it: that is told, instead of taking its scenario for new."""
    return os.path.lexists(path / "meta.json") or any(next(path.glob(left), None) for left in _LEFT_BY_RUNS)


def targets(paths: Sequence[Path]) -> list[Target]:
    """Every scenario and run folder that the paths name, folders recursively and in name order, each once."""
    unique: dict[str, Target] = {}
    for path in paths:
        for target in _under(path):
            unique.setdefault(os.path.realpath(target.path), target)
    return list(unique.values())


def select(found: Sequence[Target], wanted: Sequence[str], unwanted: Sequence[str]) -> list[Target]:
    """The targets whose name matches one of the `wanted` globs (all without any) and none of the `unwanted`.

    Raises:
        UsageError: E001 when nothing is left, because nothing checked is no success.
    """
    kept = [t for t in found if not wanted or _matches(t, wanted)]
    kept = [t for t in kept if not _matches(t, unwanted)]
    if not kept:
        names = ", ".join(target.name for target in found[:10]) or "none"
        raise UsageError("E001", "no scenario is selected", why=f"found: {names}", hint="check paths and globs")
    return kept


def load_all(chosen: Sequence[Target], overrides: Sequence[str] = ()) -> list[Scenario]:
    """The scenarios of the targets; a run folder's is the one it ran with. All bad files are reported at once."""
    from moe_eplb.core import scenario

    loaded, errors = [], []
    for target in chosen:
        path = target.path / "scenario.yaml" if target.finished else target.path
        try:
            loaded.append(scenario.load(path, overrides))
        except ScenarioError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UsageError("E005", f"{len(errors)} scenarios are not acceptable", why="\n".join(["", *map(str, errors)]))
    return loaded


def _under(path: Path) -> Iterator[Target]:
    mode = _mode(path)
    if stat.S_ISREG(mode):
        yield Target(path, finished=False)
        return
    if not stat.S_ISDIR(mode):
        raise UsageError("E016", f"{path} is neither a file nor a folder", hint="pipes and devices are not read")
    for folder, folders, files in os.walk(path, onerror=_unreadable):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if name != DATA_FOLDER and not name.startswith("."))
        if is_run_folder(here):
            folders.clear()
            yield Target(here, finished=True)
            continue
        yield from (Target(here / name, finished=False) for name in sorted(files) if name.endswith(_SUFFIXES))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "give a scenario file, a folder of them, or a run folder"
        raise UsageError("E003", f"there is no {path}", hint=hint) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError("E016", f"{path} cannot be read", why=why) from error


def _unreadable(error: OSError) -> NoReturn:
    """What cannot be searched may hold what was asked for."""
    raise UsageError("E016", f"{error.filename} cannot be searched", why=error.strerror or str(error)) from error


def _matches(target: Target, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(target.name, glob) for glob in globs)
