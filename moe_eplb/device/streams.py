"""Names of the model-wide streams and of the events that order them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

__all__ = ["AuxStreamType", "EventType"]

_AUX_STREAMS = ("Attention", "MoeShared", "MoeChunkingOverlap", "MoeBalancer")

if TYPE_CHECKING:
    # The same names again, because a type checker cannot read an enumeration made from a list.
    class AuxStreamType(enum.Enum):
        """Auxiliary streams beside the main one; a model may let two of them share a stream, never MoeBalancer."""

        Attention = 1
        MoeShared = 2
        MoeChunkingOverlap = 3
        MoeBalancer = 4

    class EventType(enum.Enum):
        """Main and every auxiliary stream."""

        Main = 1
        Attention = 2
        MoeShared = 3
        MoeChunkingOverlap = 4
        MoeBalancer = 5

else:
    AuxStreamType = enum.Enum("AuxStreamType", _AUX_STREAMS)
    EventType = enum.Enum("EventType", ("Main", *_AUX_STREAMS))
