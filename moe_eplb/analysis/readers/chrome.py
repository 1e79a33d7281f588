"""Reader of PyTorch profiler traces (Kineto's Chrome JSON), plain or gzip.

Source of the format: Chrome's Trace Event Format and Kineto's output_json.cpp.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Names, Table, filled
from moe_eplb.analysis.readers.chrome_times import FloatsTooCoarse, exact_times, nanoseconds
from moe_eplb.analysis.readers.json_events import EventText
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits, too_large
from moe_eplb.core.errors import TraceError

__all__ = ["INCOMPLETE_KEY", "WHOLE_GRAPH", "read_chrome"]

Event: TypeAlias = dict[str, Any]
INCOMPLETE_KEY = "eplb_incomplete"
"""Where a converted trace says what is missing; the form itself has no place for it."""
_EPOCH_NS = 10**18
"""A time beyond it, 32 years, is wall clock and no time since a start."""
WHOLE_GRAPH = "eplb_whole_graph"
"""The category of graph replays that were traced as a whole, in converted traces."""
_GPU_KINDS = {"kernel": c.KERNEL, "gpu_memcpy": c.MEMCPY, "gpu_memset": c.MEMSET, WHOLE_GRAPH: c.GRAPH}
_CALLS = ("cuda_runtime", "cuda_driver")
_RANGES = {"user_annotation": c.PUSH_POP, "cpu_op": c.OPERATOR}
_SYNCS = {"Stream Wait Event": c.SYNC_WAIT, "Event Sync": c.SYNC_EVENT, "Stream Sync": c.SYNC_STREAM}
_OTHER_SYNC = 4
_KEPT_TEXT = 4096
"""Characters of a name that are kept."""
_SHOWN, _CATEGORIES = 40, 20
"""Characters of a category, and how many categories, that are told of."""
_SILENT = {"gpu_user_annotation", "Trace", "python_function"}
"""Slices that say nothing which others do not say: copies of ranges on the GPU's lanes, and the trace's own name."""


def read_chrome(path: Path, limits: Limits = DEFAULT_LIMITS) -> Capture:
    """Read a trace of one rank.

    Raises:
        TraceError: the file is missing, cut off, damaged, empty or too large.
    """
    text, tables = EventText(path, limits), _Tables()
    exact = False
    for raw, events in text.batches():
        try:
            exact = exact or not _fits(tables, events)
            if exact:
                tables.exact = True
                tables.add(orjson.loads(exact_times(raw)))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"{type(error).__name__}: {error}"[:300]
            raise TraceError("E062", "a trace has damaged values", why=why, where=str(path)) from error
        if tables.count > limits.events:
            raise too_large(path, f"more than {limits.events} events", f"{tables.count} were read")
        if tables.names.characters > limits.kept_text:
            raise too_large(
                path, f"more than {limits.kept_text} characters of names", f"{tables.count} events were read"
            )
    if not tables.count:
        raise TraceError("E063", "a trace is empty", why="it has no events", where=str(path))
    return _capture(path, text.about, tables)


def _fits(tables: _Tables, events: list[Any]) -> bool:
    try:
        tables.add(events)
    except FloatsTooCoarse:
        return False
    return True


class _Tables:
    """What was read so far."""

    def __init__(self) -> None:
        self.names = Names()
        self.count = 0
        self.exact = False
        self.unread: Counter[str] = Counter()
        self.parts: dict[str, list[Table]] = {"gpu": [], "calls": [], "ranges": [], "syncs": [], "spans": []}
        self._threads: dict[str, int] = {}

    def add(self, events: list[Any]) -> None:
        """Take a batch in as a whole, or nothing of it."""
        groups: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            groups[event.get("cat", "") if event["ph"] == "X" else ""].append(event)
        others = (event.get("cat", "without category") for event in groups.pop("", ()) if event["ph"] in "XBE")
        unread = Counter(category[:_SHOWN] for category in others)
        parts = []
        for category, members in groups.items():
            read = self._reader(category)
            if read is not None:
                parts.append((read[0], read[1](category, members)))
            elif category not in _SILENT:
                unread[category[:_SHOWN]] += len(members)
        for table, part in parts:
            self.parts[table].append(part)
        self.count += len(events)
        self.unread.update(unread)

    def table(self, name: str, dtype: np.dtype[Any]) -> Table:
        """All parts of a table as one."""
        parts = self.parts.pop(name)
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def _reader(self, category: str) -> tuple[str, Callable[[str, list[Event]], Table]] | None:
        if category in _GPU_KINDS:
            return "gpu", self._gpu
        if category in _CALLS:
            return "calls", self._calls
        if category in _RANGES:
            return "ranges", self._ranges
        return {"cuda_sync": ("syncs", self._syncs), "overhead": ("spans", self._spans)}.get(category)

    def _gpu(self, category: str, events: list[Event]) -> Table:
        said = [event.get("args") or {} for event in events]
        return filled(
            c.GPU, len(events), **self._times(events), name=self._named(events), kind=_GPU_KINDS[category],
            stream=_given_or(said, "stream", events, "tid"), device=_given_or(said, "device", events, "pid"),
            correlation=_given(said, "correlation"), graph_node=_positive(_given(said, "graph node id")),
            bytes=np.maximum(_given(said, "bytes"), 0), **_ours(said),
        )  # fmt: skip

    def _calls(self, category: str, events: list[Event]) -> Table:
        said = [event.get("args") or {} for event in events]
        return filled(
            c.CALL, len(events), **self._times(events), name=self._named(events), thread=self._on_threads(events),
            correlation=_given(said, "correlation"),
        )  # fmt: skip

    def _ranges(self, category: str, events: list[Event]) -> Table:
        return filled(
            c.RANGE, len(events), **self._times(events), text=self._named(events), thread=self._on_threads(events),
            domain=self.names[category], kind=_RANGES[category],
        )  # fmt: skip

    def _syncs(self, category: str, events: list[Event]) -> Table:
        said = [event.get("args") or {} for event in events]
        return filled(
            c.SYNC, len(events), **self._times(events), correlation=_given(said, "correlation"),
            stream=_given(said, "stream"), device=_given(said, "device"), on_stream=_given(said, "wait_on_stream"),
            on_correlation=_given(said, "wait_on_cuda_event_record_corr_id"),
            kind=np.array([_SYNCS.get(event["name"], _OTHER_SYNC) for event in events]),
        )  # fmt: skip

    def _spans(self, category: str, events: list[Event]) -> Table:
        return filled(c.HOST_SPAN, len(events), **self._times(events), thread=self._on_threads(events), kind=c.OVERHEAD)

    def _times(self, events: list[Event]) -> dict[str, NDArray[np.int64]]:
        start = nanoseconds(list(map(itemgetter("ts"), events)), self.exact)
        duration = nanoseconds([event.get("dur", 0) for event in events], self.exact)
        if len(duration) and duration.min() < 0:
            raise ValueError(f"an event lasts {int(duration.min())} ns")
        return {"start": start, "end": start + duration}

    def _named(self, events: list[Event]) -> NDArray[np.int64]:
        names = self.names
        return _whole([names[event["name"][:_KEPT_TEXT]] for event in events])

    def _on_threads(self, events: list[Event]) -> NDArray[np.int64]:
        threads = list(map(itemgetter("tid"), events))
        if set(map(type, threads)) <= {int}:
            return _whole(threads)
        return _whole(
            [
                t if type(t) is int else self._threads.setdefault(str(t)[:_SHOWN], -2 - len(self._threads))
                for t in threads
            ]
        )


def _whole(values: list[Any]) -> NDArray[np.int64]:
    return np.frombuffer(array("q", values), np.int64) if values else np.empty(0, np.int64)


def _given(said: list[Event], key: str) -> NDArray[np.int64]:
    return _whole([args.get(key, c.UNKNOWN) for args in said])


def _given_or(said: list[Event], key: str, events: list[Event], other: str) -> NDArray[np.int64]:
    """A value among the arguments, else where Kineto's lanes have it."""
    pairs = zip(said, events, strict=True)
    return _whole([args[key] if key in args else event[other] for args, event in pairs])


def _ours(said: list[Event]) -> dict[str, NDArray[np.int64]]:
    """What a converted trace says of its events itself."""
    if not any("eplb role" in args or "eplb layer" in args or "eplb iteration" in args for args in said):
        return {}
    roles = _whole([args.get("eplb role", c.UNSET_ROLE) for args in said])
    if ((roles != c.UNSET_ROLE) & ((roles < 0) | (roles >= len(c.ROLES)))).any():
        raise ValueError("a role that does not exist")
    return {"role": roles, "layer": _given(said, "eplb layer"), "iteration": _given(said, "eplb iteration")}


def _positive(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(values > 0, values, c.UNKNOWN)


def _capture(path: Path, about: Event, tables: _Tables) -> Capture:
    read = {name: tables.table(name, dtype) for name, dtype in _DTYPES.items()}
    stated = about.get("distributedInfo")
    rank = stated.get("rank") if isinstance(stated, dict) else None
    known = type(rank) is int and 0 <= rank < 1 << 31
    for table in read.values():
        table["process"] = table["rank"] = rank if known else 0
    unread = sorted(tables.unread.items())
    notes = [f"{count} events of category {name} are not read" for name, count in unread[:_CATEGORIES]]
    if len(unread) > _CATEGORIES:
        more = sum(count for _, count in unread[_CATEGORIES:])
        notes.append(f"{more} events of {len(unread) - _CATEGORIES} other categories are not read")
    first = min((int(table["start"].min()) for table in read.values() if len(table)), default=0)
    base = about.get("baseTimeNanoseconds")
    utc = 0 if first > _EPOCH_NS else base if type(base) is int and base > 0 else None
    notes += [] if known else ["the trace does not state its rank"]
    incomplete = about.get(INCOMPLETE_KEY)
    return Capture(
        source=str(path), form="PyTorch profiler", names=tuple(tables.names), gpu=read["gpu"], calls=read["calls"],
        ranges=read["ranges"], syncs=read["syncs"], spans=read["spans"], utc=utc, notes=tuple(notes),
        incomplete=incomplete if isinstance(incomplete, str) else "", rank_source="stated" if known else "counted",
    ).in_order()  # fmt: skip


_DTYPES = {"gpu": c.GPU, "calls": c.CALL, "ranges": c.RANGE, "syncs": c.SYNC, "spans": c.HOST_SPAN}
