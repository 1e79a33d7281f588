"""How kernels are compiled: without the interpreter's lock, so that the thread that serves is not slowed, and kept."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from numba import njit

__all__ = ["compiled", "forget_others", "inlined"]


def forget_others(folder: Path) -> None:
    """Delete the machine code that numba has kept of kernels in a folder whose sources were others.

    Numba looks at a kernel's own file to know whether what it kept is old, not at the files of the kernels that it
    calls, whose code is part of it: it would go on with the old ones.
    """
    kept = folder / "__pycache__"
    sources = hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))), digest_size=8)
    stamp = kept / f"sources-{sources.hexdigest()}"
    # Where nothing may be written, numba keeps nothing here, and the sources do not change.
    if stamp.exists() or not os.access(folder, os.W_OK):
        return
    kept.mkdir(exist_ok=True)
    for path in (*kept.glob("*.nbi"), *kept.glob("*.nbc"), *kept.glob("sources-*")):
        path.unlink(missing_ok=True)
    stamp.touch()


forget_others(Path(__file__).parent)

compiled = njit(cache=True, nogil=True)

inlined = njit(cache=True, nogil=True, forceinline=True)
"""For what inner loops call: a state is a hundred words of arguments, which cost more than the work."""
