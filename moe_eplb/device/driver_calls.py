"""Several calls of the driver in one, without the interpreter's lock.

A thread that calls the driver one call at a time gives the lock back and asks for it again each time, and each time it
comes back the thread that launches the model has to wait for a change of threads. Compiled, a whole sequence costs one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_eplb.core.errors import BalancerError

__all__ = ["NOT_READY", "SIGNATURES", "DriverCalls", "addresses", "driver", "driver_calls", "require_success"]

_U64, _U32 = ctypes.c_uint64, ctypes.c_uint32
SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "cuEventRecord": (_U64, _U64),
    "cuEventQuery": (_U64,),
    "cuMemcpyAsync": (_U64, _U64, _U64, _U64),
    "cuStreamWriteValue64_v2": (_U64, _U64, _U64, _U32),
}
"""Arguments of the driver's functions, pointers as integers; each returns a `CUresult`."""
NOT_READY = 600
"""CUDA_ERROR_NOT_READY."""


class DriverCalls:
    """Sequences of driver calls; each ends at the first that fails and returns its `CUresult`, 0 for success.

    Args:
        functions: C functions with `SIGNATURES`.
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self.copy: Callable[..., int] = _compiled_copy(functions)
        """(stream, targets, sources, bytes, words, values, event), arrays of uint64 but for stream and event: enqueue
        copies in that order, behind them what is written to words of 64 bits, and behind that the event."""
        self.happened: Callable[[int], int] = _compiled_query(functions)
        """(event): `NOT_READY` when it has not happened yet. The interpreter's lock is kept: it takes no time."""


@cache
def driver() -> ctypes.CDLL:
    """The driver of this machine, for calls that nothing waits for."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def driver_calls() -> DriverCalls:
    """Over the driver of this machine; compiled when first asked for."""
    functions = {}
    for name, arguments in SIGNATURES.items():
        functions[name] = function = getattr(driver(), name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return DriverCalls(functions)


def addresses(
    copies: Sequence[tuple[Tensor, Tensor]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Addresses of the targets and sources of (target, source) pairs, and their bytes, for `DriverCalls.copy`.

    Raises:
        BalancerError: E215 when a pair has not the same bytes in a row.
    """
    for target, source in copies:
        if target.nbytes != source.nbytes or not (target.is_contiguous() and source.is_contiguous()):
            raise BalancerError(
                "E215", "these tensors cannot be copied byte by byte",
                why=f"target {tuple(target.shape)} {target.dtype}, source {tuple(source.shape)} {source.dtype}, "
                f"contiguous: {target.is_contiguous()} and {source.is_contiguous()}",
                hint="register contiguous weights of the same shape and dtype",
            )  # fmt: skip
    return (
        np.array([target.data_ptr() for target, _ in copies], np.uint64),
        np.array([source.data_ptr() for _, source in copies], np.uint64),
        np.array([target.nbytes for target, _ in copies], np.uint64),
    )


def require_success(call: str, code: int) -> None:
    """Raise BalancerError E171 when a driver call, or one of a sequence that begins with it, has failed."""
    if code:
        raise BalancerError(
            "E171", f"the driver refused {call}", why=f"CUresult {code}",
            hint="`eplbctl doctor` shows what this GPU and driver can do",
        )  # fmt: skip


def _compiled_copy(functions: Mapping[str, Any]) -> Any:
    from numba import njit, types

    memcpy, write_value = functions["cuMemcpyAsync"], functions["cuStreamWriteValue64_v2"]
    record, column = functions["cuEventRecord"], types.uint64[::1]

    @njit(types.intc(types.uint64, column, column, column, column, column, types.uint64), nogil=True)
    def copy(stream, targets, sources, sizes, words, values, event):  # type: ignore[no-untyped-def]
        for i in range(len(sizes)):
            code = memcpy(targets[i], sources[i], sizes[i], stream)
            if code != 0:
                return code
        for i in range(len(words)):
            code = write_value(stream, words[i], values[i], np.uint32(0))
            if code != 0:
                return code
        return record(event, stream)

    return copy


def _compiled_query(functions: Mapping[str, Any]) -> Any:
    from numba import njit, types

    query = functions["cuEventQuery"]

    @njit(types.intc(types.uint64))
    def happened(event: int) -> int:
        return query(event)  # type: ignore[no-any-return]

    return happened
