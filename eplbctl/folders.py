"""Names of new run folders."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

from eplbctl.output import require_room
from moe_eplb.core.errors import UsageError

__all__ = ["default_name", "new_folder", "require_free"]


def default_name(scenario: str) -> str:
    """``<scenario>-<UTC time>``."""
    return f"{scenario}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder below `parent`: `name`, or `name` with the first free number behind it.

    Making it is what claims the name: another process that wants it at the same moment gets the next one.
    """
    require_room(parent)
    parent.mkdir(parents=True, exist_ok=True)
    for candidate in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
        try:
            (parent / candidate).mkdir()
        except FileExistsError:
            continue
        return parent / candidate
    raise AssertionError("the numbers do not end")


def require_free(folder: Path) -> None:
    """Raise UsageError when `folder` holds anything, since a run never overwrites, or when it cannot be made."""
    require_room(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError("E002", f"{folder} exists already and is not empty", hint="give --out another folder")
