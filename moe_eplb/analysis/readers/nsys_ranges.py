"""Texts and NVTX ranges of an Nsight Systems export.

A range's name stands in its row or in `StringIds`. Names of domains and categories are rows of the same table, found by
process and number, so they are collected first.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Names, Table, filled
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.readers.columns import Tables

__all__ = ["TID_BITS", "Columns", "Strings", "in_time", "process_of", "read_ranges"]

Columns: TypeAlias = dict[str, NDArray[np.int64]]

TID_BITS = 24
"""A thread's number stands in the lowest bits of its global number, above it its process."""
_KIND_BY_NUMBER = {59: c.PUSH_POP, 70: c.PUSH_POP, 60: c.START_END, 71: c.START_END, 34: c.MARK, 65: c.MARK}
_DOMAIN_CREATE, _CATEGORY = 75, 33
_NAMELESS = "[name not in the trace]"
_PAYLOADS = dict.fromkeys(("int64Value", "uint64Value", "int32Value", "uint32Value"), c.NO_PAYLOAD)


class Strings:
    """`StringIds` by the numbers that the model gives its texts."""

    def __init__(self, database: Tables) -> None:
        self.pool = Names()
        texts = database.texts("StringIds", "id", "value")
        self._ids = np.array(sorted(texts), np.int64)
        self._numbers = np.array(self.pool.numbers(texts[key] for key in self._ids.tolist()), np.int64)

    def names(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The model's number of each text; a reference to nothing is named after what it says."""
        if not len(self._ids):
            return np.full(len(ids), self.pool[_NAMELESS], np.int64)
        at = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        known = self._ids[at] == ids
        return self._numbers[at] if known.all() else np.where(known, self._numbers[at], self.pool[_NAMELESS])


def read_ranges(database: Tables, strings: Strings) -> Table:
    """`NVTX_EVENTS` as a table of ranges and marks, with the names of their domains and categories."""
    optional = {"end": c.UNKNOWN, "globalTid": 0, "textId": c.UNKNOWN, "domainId": 0, "category": 0} | _PAYLOADS
    rows = database.integers("NVTX_EVENTS", ("rowid", "start", "eventType"), optional)
    process, text, kinds = process_of(rows["globalTid"]), _texts(rows, database, strings), _kinds(rows["eventType"])
    domain = _declared(rows, process, text, _DOMAIN_CREATE, ("domainId",))
    category = _declared(rows, process, text, _CATEGORY, ("domainId", "category"))
    end = np.where(kinds == c.MARK, rows["start"], rows["end"])
    keep = kinds >= 0
    in_time({"start": rows["start"][keep], "end": end[keep]}, "NVTX_EVENTS", open_end=True)
    columns = {
        "start": rows["start"], "end": end, "thread": rows["globalTid"], "process": process, "text": text,
        "payload": _payload(rows), "kind": kinds, "domain": domain, "category": category,
    }  # fmt: skip
    return filled(c.RANGE, int(keep.sum()), **{name: column[keep] for name, column in columns.items()})


def in_time(columns: Columns, table: str, *, open_end: bool = False) -> Columns:
    """The columns, once it is sure that nothing ends before it starts.

    Raises:
        ValueError: something does.
    """
    backward = columns["end"] < columns["start"]
    if open_end:
        backward &= columns["end"] != c.UNKNOWN
    if backward.any():
        raise ValueError(f"{table}: {int(backward.sum())} rows end before they start")
    if len(backward) and int(np.abs(columns["start"]).max()) > 1 << 61:
        raise ValueError(f"{table}: a time of {int(np.abs(columns['start']).max())} ns")
    return columns


def process_of(thread: NDArray[np.int64]) -> NDArray[np.int64]:
    """The global number of each thread's process."""
    return thread >> TID_BITS << TID_BITS


def _texts(rows: Columns, database: Tables, strings: Strings) -> NDArray[np.int64]:
    """A text that stands in the row itself counts before a registered one."""
    registered = rows["textId"] != c.UNKNOWN
    numbers = np.full(len(registered), strings.pool[""], np.int64)
    numbers[registered] = strings.names(rows["textId"][registered])
    own = database.texts("NVTX_EVENTS", "rowid", "text")
    if own:
        order = np.argsort(rows["rowid"])
        at = np.searchsorted(rows["rowid"], np.fromiter(own, np.int64, len(own)), sorter=order)
        numbers[order[at]] = strings.pool.numbers(own.values())
    return numbers


def _kinds(event_types: NDArray[np.int64]) -> NDArray[np.int64]:
    known, inverse = np.unique(event_types, return_inverse=True)
    return np.array([_KIND_BY_NUMBER.get(kind, -1) for kind in known.tolist()], np.int64)[inverse.reshape(-1)]


def _payload(rows: Columns) -> NDArray[np.int64]:
    value: NDArray[np.int64] = np.full(len(rows["start"]), c.NO_PAYLOAD)
    for name in _PAYLOADS:
        value = np.where(value == c.NO_PAYLOAD, rows[name], value)
    return value


def _declared(
    rows: Columns, process: NDArray[np.int64], text: NDArray[np.int64], event_type: int, keys: tuple[str, ...]
) -> NDArray[np.int64]:
    """For each row the text of the declaration that its process and the keys lead to, or UNKNOWN."""
    columns = [process, *(rows[key] for key in keys)]
    said = rows["eventType"] == event_type
    texts = dict(
        zip(zip(*(column[said].tolist() for column in columns), strict=True), text[said].tolist(), strict=True)
    )
    found = np.full(len(process), c.UNKNOWN, np.int64)
    if texts:
        distinct, group = distinct_rows(columns)
        found = np.array([texts.get(tuple(row), c.UNKNOWN) for row in distinct.tolist()], np.int64)[group]
    return found
