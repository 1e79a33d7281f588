"""Copies between GPUs that give way to what ranks exchange over the same link.

A dispatch or combine that meets copies on the link begins later and takes longer, whatever compute hides the copies. So
they are made in parts, and the copy stream waits before each part until the link is free, which kernels of the main
stream say on their way, see `moe_eplb.device.ops.triton_link`. No wait is without a bound: copies stop giving way when
the iteration begins in front of which they have to be there, and a part that waits for long frees the link itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.driver_calls import NOT_READY, driver_functions, require_success
from moe_eplb.device.resting import resting

__all__ = ["CopiesInParts", "Parts", "compiled_parts", "in_parts"]

_LOG = logging.getLogger(__name__)

_PART_BYTES = 2 << 20
"""About 7 us over NVLink, for which an exchange that begins may meet a part."""
_OUTSTANDING = 8
"""Parts that are enqueued and not done. A stream that waits with a full queue would hold up whoever launches next."""
_REST_US = 20
_PATIENCE_NS = 50_000_000
"""For a part. Exchanges take less by orders of magnitude, unless a rank is late, hangs or is lost."""
_LONGEST_NS = 60_000_000_000


class Parts(NamedTuple):
    """Addresses of targets and sources, and bytes, uint64 [N]."""

    targets: NDArray[np.uint64]
    sources: NDArray[np.uint64]
    sizes: NDArray[np.uint64]


def in_parts(copies: Parts, most: int) -> Parts:
    """The same bytes in the same order, at most so many a part."""
    sizes = copies.sizes.astype(np.int64)
    counts = -(-sizes // most)
    which = np.repeat(np.arange(len(sizes)), counts)
    begin = (np.arange(len(which)) - np.repeat(counts.cumsum() - counts, counts)) * most
    offset = begin.astype(np.uint64)
    return Parts(
        copies.targets[which] + offset,
        copies.sources[which] + offset,
        np.minimum(most, sizes[which] - begin).astype(np.uint64),
    )


class CopiesInParts:
    """Makes copies on a stream; returns when they are done. For one thread.

    Args:
        stream: Where the copies go.
        opener: Another one, which frees the link when that has to be.
        link: See `moe_eplb.device.Device.link`.
        begun: int64 [1], host-visible, the iteration that the device has begun last.
    """

    def __init__(self, stream: torch.cuda.Stream, opener: torch.cuda.Stream, link: Tensor, begun: Tensor) -> None:
        self._stream, self._opener = stream, opener
        self._link, self._begun = link, begun.numpy()
        self._events = [torch.cuda.Event() for _ in range(_OUTSTANDING)]  # type: ignore[no-untyped-call]
        for event in self._events:
            event.record(stream)  # the driver's event exists from here on
        self._copy = _of_this_machine()

    def __call__(self, copies: Parts, until: int) -> None:
        """Copy, giving way as long as the device has not begun iteration `until`.

        Raises:
            BalancerError: E171 when the driver refuses, E219 when a part is not done within a minute.
        """
        events = np.array([event.cuda_event for event in self._events], np.uint64)
        freed = np.zeros(1, np.int64)
        code = self._copy(
            self._stream.cuda_stream, *in_parts(copies, _PART_BYTES), self._link.data_ptr(), events, self._begun, until,
            self._opener.cuda_stream, freed, _PATIENCE_NS, _LONGEST_NS,
        )  # fmt: skip
        if freed[0]:
            _LOG.warning(
                "copies of %d bytes waited %g s for ranks that exchange rows, and then gave way no more",
                copies.sizes.sum(), _PATIENCE_NS / 1e9,
            )  # fmt: skip
        if code == NOT_READY:
            raise BalancerError(
                "E219", f"a copy between GPUs was not done after {_LONGEST_NS / 1e9:g} s",
                hint="the GPU that it reads from, or this one, hangs or is lost",
            )  # fmt: skip
        require_success("cuStreamWaitValue32, cuMemcpyAsync, cuEventRecord, cuEventQuery or cuStreamWriteValue32", code)


@cache
def _of_this_machine() -> Callable[..., int]:
    return compiled_parts(driver_functions())


def compiled_parts(functions: Mapping[str, Any]) -> Callable[..., int]:
    """Over C functions with `driver_calls.SIGNATURES`.

    (stream, targets, sources, sizes, link, events, begun, until, opener, freed, patience ns, longest ns) -> CUresult:
    makes the copies in order, as many under way as there are events; each waits for the link while `begun` is less than
    `until`. A part that is not done after the patience frees the link by a write of stream `opener`, again and again,
    and sets `freed`; the later ones do not wait then. `NOT_READY` when one is not done after the longest time.
    """
    from numba import njit, types

    wait_value, write_value = functions["cuStreamWaitValue32_v2"], functions["cuStreamWriteValue32_v2"]
    memcpy, record, query = functions["cuMemcpyAsync"], functions["cuEventRecord"], functions["cuEventQuery"]
    now, rest, slack = resting()
    address, column, words = types.uint64, types.uint64[::1], types.int64[::1]

    @njit(types.intc(address, address, address, words, words, types.int64, types.int64))
    def passed(event, link, opener, freed, into, patience_ns, longest_ns):  # type: ignore[no-untyped-def]
        begun = now(into)
        while True:
            code = query(event)
            if code != NOT_READY:
                return code
            waited = now(into) - begun
            if waited >= longest_ns:
                return code
            if waited >= patience_ns:
                freed[0] = 1
                code = write_value(opener, link, np.uint32(0), np.uint32(0))
                if code != 0:
                    return code
            rest(np.uint32(_REST_US))

    @njit(
        types.intc(address, column, column, column, address, column, words, types.int64, address, words, types.int64,
                   types.int64),
        nogil=True,
    )  # fmt: skip
    def copy(  # type: ignore[no-untyped-def]
        stream, targets, sources, sizes, link, events, begun, until, opener, freed, patience_ns, longest_ns
    ):
        into, former, code = np.zeros(2, np.int64), slack(1), 0
        under_way = len(events)
        for i in range(len(sizes) + under_way):
            if under_way <= i:
                done = events[i % under_way]
                code = passed(done, link, opener, freed, into, patience_ns, longest_ns)
            if code == 0 and i < len(sizes):
                if begun[0] < until and freed[0] == 0:
                    code = wait_value(stream, link, np.uint32(0), _EQUAL)
                if code == 0:
                    code = memcpy(targets[i], sources[i], sizes[i], stream)
                if code == 0:
                    code = record(events[i % under_way], stream)
            if code != 0:
                break
        slack(former)
        return code

    found: Callable[..., int] = copy
    return found


_EQUAL = np.uint32(1)
"""CU_STREAM_WAIT_VALUE_EQ."""
