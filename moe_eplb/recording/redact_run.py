"""Redaction of a run folder: what is known in it is redacted or holds numbers alone, and nothing else leaves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_eplb.core.errors import TraceError, UsageError
from moe_eplb.recording.redact import redact, require_no_journal
from moe_eplb.recording.redact_text import Scrubber, local_scrubber

__all__ = ["copy_run", "redact_run", "unknown_files"]

_PACKINGS = ("", ".gz", ".xz")
_CAPTURES = (
    *(f"*.sqlite{packing}" for packing in _PACKINGS),
    *(f"kineto*.json{packing}" for packing in _PACKINGS),
    *("meta.json", "verdict.json"),
)
_EVIDENCE = ("evidence.rank*.jsonl",)
_KEPT = ("scenario.yaml", "events.rank*.bin", "loads.npz", "topk_ids.npz", "topk_ids.rank*.npz", "metrics.prom")
"""Files of numbers, which hold no text of this machine, and the scenario."""
_TOLD_AT_MOST = 10


def redact_run(folder: Path) -> list[str]:
    """Redact a run folder in place: its traces, and in its other files what tells where and by whom it was run.

    ``scenario.yaml`` stays as it was run, or nobody could judge the run any more; it may name files.

    Returns:
        What was removed, for people, as `redact` says it.

    Raises:
        UsageError: E076 it holds files that are not known, such as a raw report; nothing was written then.
        TraceError: E068 a file of it is damaged, is still being written or cannot be replaced.
    """
    if unknown := unknown_files(folder):
        names = ", ".join(unknown[:_TOLD_AT_MOST]) + (" and others" if len(unknown) > _TOLD_AT_MOST else "")
        raise UsageError(
            "E076", f"{len(unknown)} files cannot be redacted in place, since they are not known", why=names,
            hint="move them away, or make a copy without them: -o PATH", where=str(folder),
        )  # fmt: skip
    removed = [f"{path.name}: {what}" for path in _matching(folder, _CAPTURES) for what in redact(path)]
    for path in _matching(folder, _EVIDENCE):
        if count := _redact_rows(path, local_scrubber(folder)):
            removed.append(f"{path.name}: {count} rows")
    return removed


def copy_run(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Make a redacted copy of what is known in a run folder.

    Args:
        folder: Stays as it is.
        target: Is made.

    Returns:
        What was removed, and the names of what was left out because it is not known.

    Raises:
        TraceError: E068 see `redact_run`.
    """
    target.mkdir()
    for path in _matching(folder, (*_CAPTURES, *_EVIDENCE, *_KEPT)):
        require_no_journal(path)
        shutil.copy2(path, target / path.name)
    return redact_run(target), unknown_files(folder)


def unknown_files(folder: Path) -> list[str]:
    """Names of what a run folder does not hold by itself, and of what never leaves it: raw reports and journals."""
    known = {path.name for path in _matching(folder, (*_CAPTURES, *_EVIDENCE, *_KEPT))}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    patterns = tuple(patterns)
    found = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in found if any(fnmatchcase(path.name, pattern) for pattern in patterns))


def _redact_rows(path: Path, scrubber: Scrubber) -> int:
    """Scrub the texts of each row and leave its keys, which are ours; returns how many rows have changed."""
    partial = path.with_name(f".{path.name}")
    try:
        before = path.read_text(encoding="utf-8").split("\n")
        after = [_redacted_row(row, scrubber) for row in before]
        changed = sum(old != new for old, new in zip(before, after, strict=True))
        if changed:
            partial.write_text("\n".join(after), encoding="utf-8")
            shutil.copymode(path, partial)
            partial.replace(path)
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError("E068", "evidence cannot be redacted", why=str(error), where=str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    return changed


def _redacted_row(row: str, scrubber: Scrubber) -> str:
    try:
        before = json.loads(row)
    except ValueError:  # a rank that was killed leaves half a row
        return scrubber.text(row)
    after = _scrubbed(before, scrubber)
    return row if after == before else json.dumps(after, separators=(",", ":"))


def _scrubbed(value: Any, scrubber: Scrubber) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(item, scrubber) for key, item in value.items()}
    if isinstance(value, list):
        return [_scrubbed(item, scrubber) for item in value]
    return scrubber.text(value) if isinstance(value, str) else value
