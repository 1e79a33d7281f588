"""How kernels are compiled: without the interpreter's lock, so that the thread that serves is not slowed, and kept."""

from __future__ import annotations

from numba import njit

__all__ = ["compiled", "inlined"]

compiled = njit(cache=True, nogil=True)

inlined = njit(cache=True, nogil=True, forceinline=True)
"""For what inner loops call: a state is a hundred words of arguments, which cost more than the work."""
