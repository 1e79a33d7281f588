"""A program that starts others, run with a bound, its output passed on, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

__all__ = ["Ended", "run_bounded"]

_GRACE_S = 15.0
"""How long everything that was started may take to clean up after SIGTERM."""
_TAIL = 40


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its exit code (minus the signal's number; None when it ran out of time), its last lines."""

    code: int | None
    tail: str


def run_bounded(command: Sequence[str], *, mark: str, timeout_s: float) -> Ended:
    """Run a program in a session of its own, so that a signal of the terminal reaches us alone, and wait for its end.

    Both of its output streams go to stderr as they come. Whatever ends the wait, also an exception in this thread,
    ends the program and all that it has started, wherever it has moved to: they are known by the variable `mark` in
    their environment.

    Raises:
        OSError: it cannot be started.
    """
    value = secrets.token_hex(8)
    environment = {**os.environ, mark: value}
    sign = f"{mark}={value}".encode()
    try:
        return _run(command, environment, sign, time.monotonic() + timeout_s)
    finally:
        _end_all(sign, _GRACE_S)


def _run(command: Sequence[str], environment: Mapping[str, str], sign: bytes, deadline: float) -> Ended:
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=_TAIL)
    assert process.stdout is not None
    reader = threading.Thread(target=_pass_on, args=(process.stdout, tail), name="moe_eplb-output", daemon=True)
    reader.start()
    try:
        in_time = _ended(process.pid, deadline)
        if not in_time:
            _end_all(sign, _GRACE_S)
        process.wait(_GRACE_S)
    except BaseException:
        _end_all(sign, _GRACE_S)
        process.wait(_GRACE_S)
        raise
    finally:
        reader.join(1.0)  # what the program has left running may hold the pipe; it is ended next
    return Ended(process.returncode if in_time else None, "".join(tail).strip())


def _pass_on(pipe: IO[bytes], tail: deque[str]) -> None:
    with pipe:
        for line in pipe:
            text = line.decode(errors="replace")
            tail.append(text)
            with contextlib.suppress(BrokenPipeError):  # a reader that left early is no error
                sys.stderr.write(text)
                sys.stderr.flush()


def _ended(pid: int, deadline: float) -> bool:
    """Wait for the end of a process without reaping it; False at the deadline."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(descriptor)


def _end_all(sign: bytes, grace_s: float) -> None:
    """Tell every process with the sign in its environment to end, then end those that have not."""
    pids = _marked(sign)
    for pid in pids:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for pid in pids:
        _ended(pid, deadline)
    for pid in _marked(sign):
        _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _marked(sign: bytes) -> list[int]:
    """Processes that carry the sign and have not ended; a zombie's environment is empty."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:  # it has ended, or belongs to somebody else
            continue
        if sign in environment.split(b"\0"):
            found.append(int(folder.name))
    return found
