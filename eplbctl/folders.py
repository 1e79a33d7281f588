"""Names of new run folders."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path

from moe_eplb.core.errors import UsageError

__all__ = ["default_name", "new_folder", "require_free"]


def default_name(scenario: str) -> str:
    """``<scenario>-<UTC time>``."""
    return f"{scenario}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"


def new_folder(parent: Path, name: str) -> Path:
    """A path below `parent` that does not exist yet: `name`, or `name` with the first free number behind it."""
    candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (parent / candidate for candidate in candidates) if not path.exists())


def require_free(folder: Path) -> None:
    """Raise UsageError when `folder` holds anything: a run never overwrites."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("E002", f"{folder} exists already and is not empty", hint="give --out another folder")
