"""The NVTX side of recording: ranges in the domain ``moe_eplb``, one registered name per kind and layer."""

from __future__ import annotations

import threading
from typing import Any

import nvtx  # type: ignore[import-untyped]

from moe_eplb.core.events import KINDS, Kind

__all__ = ["DOMAIN", "NvtxRanges", "attach"]

DOMAIN = "moe_eplb"


def attach() -> NvtxRanges | None:
    """The emitter, or None when no profiler is listening (NVTX then hands out a domain that does nothing)."""
    domain = nvtx.get_domain(DOMAIN)
    return NvtxRanges(domain) if domain.get_event_attributes(message=DOMAIN) is not None else None


class NvtxRanges:
    """Push/pop ranges and marks named ``kind`` or ``kind/layer`` with the iteration as payload."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain
        self._cache: dict[tuple[int, int, int], Any] = {}

    def push(self, kind: Kind, layer: int, iteration: int) -> None:
        """Open a range on the calling thread."""
        self._domain.push_range(self._attributes(kind, layer, iteration))

    def pop(self) -> None:
        """Close the innermost range of the calling thread."""
        self._domain.pop_range()

    def mark(self, kind: Kind, layer: int, iteration: int) -> None:
        """Emit a moment."""
        self._domain.mark(self._attributes(kind, layer, iteration))

    def _attributes(self, kind: Kind, layer: int, iteration: int) -> Any:
        # The payload is rewritten in place, so an attribute object must never be shared by two threads.
        key = (kind, layer, threading.get_ident())
        attributes = self._cache.get(key)
        if attributes is None:
            name = KINDS[kind].name
            message = name if layer < 0 else f"{name}/{layer}"
            attributes = self._cache[key] = self._domain.get_event_attributes(message=message, payload=iteration)
        attributes.payload = iteration
        return attributes
