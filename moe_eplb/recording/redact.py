"""Takes out of a capture what must not leave the machine: a raw one holds the whole environment of its process.

Removed are environment variables, tokens and passwords, arguments and lists of processes, names of users and machines,
absolute paths outside the system's folders, UUIDs, addresses and serial numbers of GPUs and network cards, and tables
about the system. Times, kernel names and the texts of our own NVTX domain stay as they are.
"""

from __future__ import annotations

import gzip
import shutil
import sqlite3
import tempfile
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from moe_eplb.core.errors import TraceError
from moe_eplb.core.packed import GZIP_MAGIC, XZ_MAGIC, un_xz
from moe_eplb.recording.redact_json import redact_json
from moe_eplb.recording.redact_sqlite import redact_sqlite
from moe_eplb.recording.redact_text import local_scrubber

__all__ = ["redact", "require_no_journal"]

_SQLITE = b"SQLite format 3\0"


def redact(path: Path) -> list[str]:
    """Replace a capture by one without what must not leave the machine; it is replaced whole or not at all.

    Args:
        path: Our canonical SQLite file, an SQLite export of Nsight Systems, or Chrome JSON as the torch profiler writes
            it; each may be compressed by gzip or xz. A redacted file is redacted already: nothing more is found in it.

    Returns:
        What was removed, for people: places and numbers, never the removed texts.

    Raises:
        TraceError: E068 it is none of these, damaged, still being written, or cannot be replaced.
    """
    path = Path(path)
    require_no_journal(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".redact-", dir=path.parent) as folder:
            plain = Path(folder) / "plain"
            packing = _unpack(path, plain)
            removed = _redact(plain, path)
            if packing:
                plain = _pack(plain, packing)
            shutil.copymode(path, plain)
            plain.replace(path)
    except (OSError, EOFError, zlib.error, sqlite3.Error, ValueError, RecursionError) as error:
        raise TraceError(
            "E068", "a capture cannot be redacted, so it must not be published", why=str(error), where=str(path)
        ) from error
    return removed


def require_no_journal(path: Path) -> None:
    """Refuse a database that is still being written: SQLite would put its journal's rows back over what is redacted.

    Raises:
        TraceError: E068 beside it lies a journal that is not empty.
    """
    real = path.resolve()  # beside what a link points to
    for journal in (Path(f"{real}-wal"), Path(f"{real}-journal")):
        if journal.exists() and journal.stat().st_size:
            why = f"{journal.name} holds {journal.stat().st_size} bytes that are not in it yet"
            hint = f'let the program that writes it end first, or run sqlite3 {path} "PRAGMA journal_mode = DELETE"'
            raise TraceError("E068", "a capture is still being written", why=why, hint=hint, where=str(path))


def _redact(plain: Path, path: Path) -> list[str]:
    scrubber = local_scrubber(path.parent)
    with plain.open("rb") as file:
        start = file.read(len(_SQLITE))
    if start == _SQLITE:
        return redact_sqlite(plain, scrubber)
    if start.lstrip()[:1] not in (b"{", b"["):
        raise ValueError("it is neither SQLite nor JSON")
    data, removed = redact_json(plain.read_text(encoding="utf-8"), scrubber)
    plain.write_text(data, encoding="utf-8")
    return removed


def _unpack(path: Path, plain: Path) -> str:
    """Write what is in the file, and say how it was packed: ``gzip``, ``xz`` or not at all."""
    with path.open("rb") as file:
        start = file.read(len(XZ_MAGIC))
    packing = "gzip" if start.startswith(GZIP_MAGIC) else "xz" if start == XZ_MAGIC else ""
    with path.open("rb") as file, plain.open("wb") as target:
        if packing == "xz":
            target.writelines(un_xz(file))
        else:
            shutil.copyfileobj(gzip.GzipFile(fileobj=file) if packing else file, target)
    return packing


def _pack(plain: Path, packing: str) -> Path:
    """Compress without a name and a time in the header, so that the same capture gives the same bytes."""
    packed = plain.with_suffix(".packed")
    with plain.open("rb") as source, packed.open("wb") as file, _packer(file, packing) as target:
        shutil.copyfileobj(source, target)
    return packed


def _packer(file: BinaryIO, packing: str) -> BinaryIO:
    if packing == "gzip":
        return cast(BinaryIO, gzip.GzipFile("", "wb", 9, file, mtime=0))
    import lzma  # see `un_xz`

    return cast(BinaryIO, lzma.LZMAFile(file, "wb", preset=9 | lzma.PRESET_EXTREME))
