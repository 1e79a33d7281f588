"""What a profiler saw, whoever wrote it down: one model for every reader and every analysis.

A capture is a handful of numpy tables. Times are int64 ns on one clock, intervals half-open, texts are numbers into
`Capture.names`, and `UNKNOWN` (-1) stands wherever a source does not say. Nothing here knows a file format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.events import Role

__all__ = [
    "CALL", "CALLED_WORK", "GPU", "GRAPH", "HOST_SPAN", "KERNEL", "MARK", "MEMCPY", "MEMSET", "NODE", "NO_PAYLOAD",
    "OPERATOR", "OVERHEAD", "PUSH_POP", "RANGE", "ROLES", "ROLE_CODE", "START_END", "SYNC", "SYNC_EVENT", "SYNC_STREAM",
    "SYNC_WAIT", "UNKNOWN", "UNSET_ROLE", "UPDATER_WORK", "Capture", "Names", "Table", "filled", "order_of",
    "role_codes",
]  # fmt: skip

Table: TypeAlias = NDArray[Any]
"""A structured array of one of the types below."""

UNKNOWN = -1
NO_PAYLOAD = -(2**63)
UNSET_ROLE = 255
ROLES: tuple[Role, ...] = tuple(Role)
ROLE_CODE: dict[Role, int] = {role: code for code, role in enumerate(ROLES)}

KERNEL, MEMCPY, MEMSET, UPDATER_WORK, GRAPH = range(5)
"""Kinds of GPU events: work of the balancer's updater thread runs on no stream; a graph is a replay that was traced as
a whole, so that nobody knows what ran in it when."""
PUSH_POP, START_END, MARK, OPERATOR = range(4)
"""Kinds of host ranges; an operator is what a framework notes for itself, not a person."""
SYNC_EVENT, SYNC_WAIT, SYNC_STREAM = 1, 2, 3
"""Kinds of synchronisation, numbered as CUPTI does: host waits for event, stream waits for event, host for stream."""
OVERHEAD, CALLED_WORK = range(2)
"""Kinds of host spans: the profiler's own cost, and a function that a stream called on the host."""

_TIMES = [("start", "<i8"), ("end", "<i8")]

GPU = np.dtype(
    [
        *_TIMES,
        ("stream", "<i8"),
        ("correlation", "<i8"),  # names the launching call within its process
        ("graph_node", "<i8"),
        ("bytes", "<i8"),
        ("process", "<i8"),
        ("name", "<i4"),
        ("rank", "<i4"),
        ("device", "<i4"),
        ("layer", "<i4"),
        ("iteration", "<i4"),
        ("kind", "u1"),
        ("role", "u1"),  # UNSET_ROLE unless the source itself says what the event is
        ("named", "u1"),  # the role that its name alone tells; UNSET_ROLE where the source says the role
    ]
)
CALL = np.dtype(
    [*_TIMES, ("thread", "<i8"), ("correlation", "<i8"), ("process", "<i8"), ("name", "<i4"), ("rank", "<i4")]
)
RANGE = np.dtype(
    [
        *_TIMES,  # end is UNKNOWN for a range that was never closed
        ("thread", "<i8"),
        ("process", "<i8"),
        ("payload", "<i8"),
        ("domain", "<i4"),
        ("category", "<i4"),
        ("text", "<i4"),
        ("rank", "<i4"),
        ("kind", "u1"),
    ]
)
SYNC = np.dtype(
    [
        *_TIMES,
        ("stream", "<i8"),
        ("correlation", "<i8"),
        ("on_stream", "<i8"),  # the stream that recorded the awaited event
        ("on_correlation", "<i8"),  # the call that recorded it
        ("process", "<i8"),
        ("rank", "<i4"),
        ("device", "<i4"),
        ("kind", "u1"),
    ]
)
NODE = np.dtype([("start", "<i8"), ("thread", "<i8"), ("node", "<i8"), ("original", "<i8"), ("process", "<i8")])
HOST_SPAN = np.dtype([*_TIMES, ("thread", "<i8"), ("process", "<i8"), ("rank", "<i4"), ("kind", "u1")])

_TABLES = {"gpu": GPU, "calls": CALL, "ranges": RANGE, "syncs": SYNC, "nodes": NODE, "spans": HOST_SPAN}


class Names(dict[str, int]):
    """Texts and their numbers; looking up a new one gives it the next number."""

    characters = 0
    """Of all texts together."""

    def __missing__(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"a name is {type(text).__name__}, not text")
        self.characters += len(text)
        number = self[text] = len(self)
        return number

    def numbers(self, texts: Iterable[str]) -> list[int]:
        """The number of each text."""
        return [self[text] for text in texts]


@dataclass(frozen=True)
class Capture:
    """One or more ranks as a profiler saw them.

    Attributes:
        source: The file, or the files, it comes from.
        form: What wrote it, such as ``nsys 3.20.3``.
        names: Text of each name, domain and category.
        gpu: GPU events [N] of type `GPU`, by rank and start.
        calls: Runtime and driver calls [C] of type `CALL`, by rank and start.
        ranges: Host ranges and marks [M] of type `RANGE`, by rank and start.
        syncs: Waits for events and streams of type `SYNC`; empty when the source records none.
        nodes: Creation of graph nodes of type `NODE`; a row that names its original comes before others of that node.
        spans: Profiler overhead and functions called by streams, of type `HOST_SPAN`.
        streams: Declared names of streams by (rank, device, stream).
        utc: Wall clock at time 0, in ns since 1970; None when the source does not say.
        incomplete: What is known to be missing, in words; empty when nothing is.
        notes: What a reader had to assume or left out.
        rank_source: Where the ranks' numbers come from: ``stated`` by the source, or ``counted`` here.
    """

    source: str
    form: str
    names: tuple[str, ...]
    gpu: Table
    calls: Table = field(default_factory=lambda: np.empty(0, CALL))
    ranges: Table = field(default_factory=lambda: np.empty(0, RANGE))
    syncs: Table = field(default_factory=lambda: np.empty(0, SYNC))
    nodes: Table = field(default_factory=lambda: np.empty(0, NODE))
    spans: Table = field(default_factory=lambda: np.empty(0, HOST_SPAN))
    streams: dict[tuple[int, int, int], str] = field(default_factory=dict)
    utc: int | None = None
    incomplete: str = ""
    notes: tuple[str, ...] = ()
    rank_source: str = "stated"

    @property
    def ranks(self) -> list[int]:
        """Ranks that have GPU events or ranges."""
        return sorted({*np.unique(self.gpu["rank"]).tolist(), *np.unique(self.ranges["rank"]).tolist()})

    def tables(self) -> dict[str, Table]:
        """Every table by its name."""
        return {name: getattr(self, name) for name in _TABLES}

    def in_order(self) -> Capture:
        """The same with every table but `nodes` by rank and start; a range comes before those that it encloses."""
        return self.with_tables(
            {name: t[order_of(t, name == "ranges")] for name, t in self.tables().items() if name != "nodes"}
        )

    def with_tables(self, tables: dict[str, Table]) -> Capture:
        """The same with other tables."""
        return replace(self, **tables)  # type: ignore[arg-type]  # mypy takes each for every field


def order_of(table: Table, may_be_open: bool) -> NDArray[np.int64]:
    """Rows by rank and start; of those that start at once the longest first, and last what was never closed.

    Args:
        table: With a start, an end and a rank.
        may_be_open: An end may be UNKNOWN.
    """
    never_closed = (table["end"] == UNKNOWN) & may_be_open
    return np.lexsort((-table["end"], never_closed, table["start"], table["rank"]))


def filled(dtype: np.dtype[Any], count: int, **columns: Any) -> Table:
    """A table of one of the types here; columns not named are unknown.

    Raises:
        OverflowError: a value does not fit its column.
    """
    table = np.empty(count, dtype)
    defaults = {"payload": NO_PAYLOAD, "role": UNSET_ROLE, "named": UNSET_ROLE, "kind": 0, "bytes": 0}
    for name in dtype.names or ():
        value = columns.pop(name, None)
        kind = dtype[name]
        if value is None:
            table[name] = defaults.get(name, UNKNOWN)
            continue
        if isinstance(value, np.ndarray) and value.dtype != kind and len(value):
            limits = np.iinfo(kind)
            if int(value.min()) < limits.min or int(value.max()) > limits.max:
                raise OverflowError(f"{name} is {int(value.min())} to {int(value.max())}, beyond {kind}")
        table[name] = value
    if columns:
        raise TypeError(f"no such columns: {', '.join(columns)}")
    return table


def role_codes(roles: Iterable[Role]) -> list[int]:
    """The code of each role."""
    return [ROLE_CODE[role] for role in roles]
