"""Lines for people, and files for programs.

A reader of lines that leaves early (head, a closed pager) is no error and changes no exit code. A file is written whole
or not at all: until it is complete, an older one of its name stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from eplbctl.signals import held
from moe_eplb.core.errors import RunFailed, UsageError

__all__ = ["place_file", "require_room", "require_writable", "say", "without_stdout", "write_file"]


def say(text: str, *, err: bool = False) -> None:
    """Print a line to stdout, or to stderr; once the reader has gone, the stream's later lines go nowhere."""
    stream = sys.stderr if err else sys.stdout
    try:
        try:
            click.echo(text, err=err)
        except UnicodeEncodeError:  # a path that is no text, or a terminal of another encoding
            encoding = stream.encoding or "ascii"
            click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def without_stdout() -> Iterator[None]:
    """What libraries print to stdout from C goes nowhere: it would stand between the lines of a result."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C keeps lines back when stdout is no terminal
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def require_writable(path: Path, *, force: bool) -> None:
    """Raise UsageError unless `path` can be written: it must be free, or `force` given, and its folder must exist."""
    try:
        mode = _mode(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise UsageError("E002", f"{path} is a folder", hint="give the path of a file")
        if mode is not None and stat.S_ISREG(mode) and not force:
            raise UsageError(
                "E002", f"{path} exists already", hint="use --force to overwrite it, or choose another name"
            )
        real = _real(path)
        if not real.parent.is_dir():
            raise UsageError("E004", f"there is no folder {real.parent} to write {real.name} to", hint="make it first")
        if mode is None or stat.S_ISREG(mode):
            _probe(real.parent)
        else:
            os.close(_open_special(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError("E014", f"{path} cannot be written", why=_why(error)) from error


def require_room(folder: Path) -> None:
    """Raise UsageError unless files can be made in `folder`, or it can be made itself; it is not made yet."""
    try:
        present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not present.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{present} is no folder")
        _mode(present / folder.name)  # the name may be too long
        _probe(present)
    except (OSError, ValueError) as error:
        raise UsageError("E015", f"{folder} cannot be a folder for runs", why=_why(error)) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave what was there; RunFailed E183 when it cannot be written."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            _replace(_real(path), data, mode)
        else:
            _write(_open_special(path), data)
    except (OSError, RuntimeError) as error:
        raise RunFailed("E183", "the output could not be written", why=_why(error)) from error


def place_file(made: Path, path: Path) -> None:
    """Move a finished file of the same file system to its place; RunFailed E183 when that cannot be done."""
    try:
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            _write(_open_special(path), made.read_bytes())
            return
        made.chmod(stat.S_IMODE(mode) if mode is not None else 0o666 & ~_umask())
        made.replace(_real(path))
    except (OSError, RuntimeError) as error:
        raise RunFailed("E183", "the output could not be written", why=_why(error)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(path: Path, data: bytes, mode: int | None) -> None:
    partial = path.with_name(f".eplbctl-{os.urandom(8).hex()}")
    with held():
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            if mode is not None:
                os.fchmod(descriptor, stat.S_IMODE(mode))
            _write(descriptor, data, durable=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _write(descriptor: int, data: bytes, *, durable: bool = False) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(descriptor)


def _open_special(path: Path) -> int:
    """Open a device or a pipe; one that nobody reads is an error instead of a wait."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _probe(folder: Path) -> None:
    """Make and remove a file: permissions alone do not tell of a file system that is mounted read-only."""
    trial = folder / f".eplbctl-{os.urandom(8).hex()}"
    with held():
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        trial.unlink()


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _real(path: Path) -> Path:
    """Where a link leads, so that it stays one."""
    return path.resolve() if path.is_symlink() else path


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
