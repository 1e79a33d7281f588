"""How kernels are compiled: without the interpreter's lock, so that the thread that serves is not slowed, and kept."""

from __future__ import annotations

from numba import njit

__all__ = ["compiled"]

compiled = njit(cache=True, nogil=True)
