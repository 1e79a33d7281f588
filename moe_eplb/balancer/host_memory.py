"""Shared memory segments that cannot collide, cannot overcommit and do not outlive their owner for long.

A segment is a file in /dev/shm named ``moe_eplb-<instance>-<pid>-<start>-<part>``. Process id and start time of the
creator make the name unique and tell, after a crash, that nobody owns the segment any more.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from moe_eplb.core.errors import HostMemoryError

__all__ = ["SHM_DIR", "Segment", "clean_segments", "create_segment", "list_segments", "new_instance", "open_segment"]

SHM_DIR = Path("/dev/shm")
_PREFIX = "moe_eplb"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment on this node. `alive`: its creator still runs. `created`: seconds since the epoch."""

    name: str
    bytes: int
    owner_pid: int
    alive: bool
    created: float


def new_instance() -> str:
    """A name part that no other balancer instance has."""
    return secrets.token_hex(6)


def segment_name(instance: str, part: str, *, pid: int | None = None) -> str:
    """The name of a segment of this process, or of the process `pid`."""
    owner = os.getpid() if pid is None else pid
    return f"{_PREFIX}-{instance}-{owner}-{_start_ticks(owner)}-{part}"


def create_segment(instance: str, part: str, size: int, *, directory: Path = SHM_DIR) -> tuple[str, mmap.mmap]:
    """Make, reserve and map a segment of `size` bytes that only this user can open (mode 0600).

    The pages are reserved before mapping: a full /dev/shm is an error here instead of a SIGBUS at first touch.
    """
    name = segment_name(instance, part)
    if not _NAME.fullmatch(name):
        raise HostMemoryError(
            "E170", f"shared host memory cannot be named {name!r}", why="it must be a plain file name",
            hint="let shared_memory_base_name consist of letters, digits, '.', '_' and '-'",
        )  # fmt: skip
    path = directory / name
    _require_free(directory, size)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise HostMemoryError(
            "E161", f"shared host memory {name} already exists", why="another balancer of this process has its name",
            hint="leave shared_memory_base_name out, or give each balancer its own",
        ) from error  # fmt: skip
    try:
        os.posix_fallocate(fd, 0, size)
        return name, mmap.mmap(fd, size)
    except OSError as error:
        path.unlink()
        if error.errno in (errno.ENOSPC, errno.EFBIG):
            raise _full(directory, size) from error
        raise
    finally:
        os.close(fd)


def open_segment(name: str, size: int, *, directory: Path = SHM_DIR) -> mmap.mmap:
    """Map another process's segment of this node, for reading and writing."""
    path = directory / name
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostMemoryError(
            "E162", f"shared host memory {name} is not there", why=f"expected {size} bytes in {directory}",
            hint="its owner has ended or runs in another container: ranks of one node must share /dev/shm",
        ) from error  # fmt: skip
    try:
        found = os.fstat(fd).st_size
        if found != size:
            raise HostMemoryError(
                "E163", f"shared host memory {name} has another size", why=f"{found}, not {size} bytes"
            )
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def remove_segment(name: str, *, directory: Path = SHM_DIR) -> None:
    """Remove one segment's name; mappings of it stay usable. No error when another cleaner was faster."""
    (directory / name).unlink(missing_ok=True)


def list_segments(*, directory: Path = SHM_DIR) -> list[Segment]:
    """All segments of this program on this node, by name."""
    found = []
    for path in sorted(directory.glob(f"{_PREFIX}-*")):
        parts = path.name.rsplit("-", 3)  # from the right: an instance may be named with dashes
        if len(parts) < 4 or not (parts[1].isdigit() and parts[2].isdigit()):
            continue
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        pid, ticks = int(parts[1]), int(parts[2])
        found.append(Segment(path.name, stat.st_size, pid, _start_ticks(pid) == ticks, stat.st_mtime))
    return found


def clean_segments(*, include_alive: bool = False, directory: Path = SHM_DIR) -> list[Segment]:
    """Remove the segments whose creator has ended (or all of them) and return what was removed."""
    stale = [s for s in list_segments(directory=directory) if include_alive or not s.alive]
    for segment in stale:
        remove_segment(segment.name, directory=directory)
    return stale


def _require_free(directory: Path, size: int) -> None:
    stat = os.statvfs(directory)
    if stat.f_bavail * stat.f_frsize < size:
        raise _full(directory, size)


def _full(directory: Path, size: int) -> HostMemoryError:
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    return HostMemoryError(
        "E160", f"{directory} is too small for the host copy of the expert weights",
        why=f"{size} bytes are required, {free} are free of {stat.f_blocks * stat.f_frsize}",
        hint="remove stale segments with `eplbctl shm clean`, or enlarge it: mount -o remount,size=... /dev/shm",
    )  # fmt: skip


def _start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); 0 without a living one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])
