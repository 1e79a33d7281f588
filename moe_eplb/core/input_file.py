"""Files that people name. Only regular ones are read: a pipe may block for ever, and a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_input", "read_input"]

_PART = 1 << 20


def open_input(path: Path) -> BinaryIO:
    """Open a regular file; OSError for anything else."""
    # Opening a pipe without a writer waits for one unless told not to.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    raise OSError(errno.EINVAL, "it is no regular file, but a pipe, a socket or a device", str(path))


def read_input(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes; OSError if it is none or larger."""
    with open_input(path) as file:
        if most is None:
            return file.read()
        parts, left = [], most + 1
        while left and (part := file.read(min(left, _PART))):  # a larger read takes its memory before there are bytes
            parts.append(part)
            left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return b"".join(parts)
