"""Writes one rank of a capture as Chrome JSON in the form of the PyTorch profiler, with every ns kept.

The form has no domains, no names of streams and no nodes of graphs, so that what these tell of events is written beside
them: their iteration, their layer, and their role where their name alone does not give it.
The same capture gives the same bytes. Source of the form: Chrome's Trace Event Format and Kineto's output_json.cpp.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.chrome import INCOMPLETE_KEY, WHOLE_GRAPH
from moe_eplb.analysis.roles import classify, prepare
from moe_eplb.analysis.writers.rows import rows_of
from moe_eplb.core.errors import UsageError

__all__ = ["chrome_losses", "write_chrome"]

_GPU = {c.KERNEL: "kernel", c.MEMCPY: "gpu_memcpy", c.MEMSET: "gpu_memset", c.GRAPH: WHOLE_GRAPH}
_RANGES = {c.PUSH_POP: "user_annotation", c.START_END: "user_annotation", c.OPERATOR: "cpu_op"}
_SYNCS = {c.SYNC_WAIT: "Stream Wait Event", c.SYNC_EVENT: "Event Sync", c.SYNC_STREAM: "Stream Sync"}
_OTHER_SYNC = "Context Sync"
_BATCH = 4096

Event = dict[str, Any]


def chrome_losses(capture: Capture) -> list[str]:
    """What of a capture this format cannot hold, in words with numbers."""
    ranges, found = capture.ranges, []
    drawn = np.isin(ranges["kind"], list(_RANGES))
    domains = {capture.names[number] for number in np.unique(ranges["domain"][drawn]).tolist() if number >= 0}
    counts = (
        (int((capture.gpu["kind"] == c.UPDATER_WORK).sum()), "pieces of the updater's work are left out"),
        (int((~drawn).sum()), "marks are left out"),
        (int((drawn & (ranges["end"] == c.UNKNOWN)).sum()), "ranges that were never closed are left out"),
        (int((drawn & (ranges["payload"] != c.NO_PAYLOAD)).sum()), "ranges lose their payload"),
        (int((drawn & (ranges["category"] >= 0)).sum()), "ranges lose their category"),
        (len(domains - {"user_annotation", "cpu_op", ""}), "NVTX domains become annotations without one"),
        (len(capture.nodes), "records of how graph nodes were made are left out"),
        (int((capture.spans["kind"] != c.OVERHEAD).sum()), "functions that streams called are left out"),
        (len(capture.streams), "names of streams are left out"),
        (len(capture.notes), "notes of the reader are left out"),
    )
    found += [f"{count} {what}" for count, what in counts if count]
    return found


def write_chrome(capture: Capture, path: Path, *, packed: bool) -> None:
    """Write a new file; the caller sees to it that `path` is free.

    Args:
        packed: With gzip, as the profiler names ``.json.gz``.

    Raises:
        UsageError: E077 there are several ranks, and this format holds one.
    """
    if len(capture.ranks) > 1:
        raise UsageError(
            "E077", "Chrome JSON of a profiler holds one rank", why=f"ranks {capture.ranks}",
            hint="choose one with --rank, convert to SQLite, or draw all with eplbctl report --format perfetto",
        )  # fmt: skip
    with path.open("wb") as file:
        if packed:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as zipped:
                _write(_told(capture), zipped)
        else:
            _write(_told(capture), file)


def _told(capture: Capture) -> Capture:
    """The capture with all that is known of its GPU events, but for roles that a reader knows by their names."""
    prepared, gpu = prepare(capture).gpu, capture.gpu.copy()
    gpu["role"] = c.UNSET_ROLE
    by_name = classify(replace(capture, gpu=gpu, ranges=capture.ranges[:0], streams={}))
    unsaid = (capture.gpu["role"] == c.UNSET_ROLE) & (prepared["role"] == by_name)
    prepared["role"][unsaid] = c.UNSET_ROLE
    return replace(capture, gpu=prepared)


def _write(capture: Capture, file: Any) -> None:
    head: dict[str, Any] = {"schemaVersion": 1, "displayTimeUnit": "ms"}
    if capture.rank_source == "stated" and capture.ranks:
        head["distributedInfo"] = {"rank": capture.ranks[0]}
    if capture.utc is not None and capture.utc > 0:
        head["baseTimeNanoseconds"] = capture.utc
    if capture.incomplete:
        head[INCOMPLETE_KEY] = capture.incomplete
    file.write(json.dumps(head)[:-1].encode() + b', "traceEvents": [\n')
    first = True
    batch: list[str] = []
    for event in _events(capture):
        batch.append(event)
        if len(batch) == _BATCH:
            file.write((("" if first else ",\n") + ",\n".join(batch)).encode())
            first, batch = False, []
    if batch:
        file.write((("" if first else ",\n") + ",\n".join(batch)).encode())
    file.write(b"\n]}\n")


def _events(capture: Capture) -> Iterator[str]:
    names = [json.dumps(name) for name in capture.names]
    for row in rows_of(capture.gpu):
        if row["kind"] in _GPU:
            yield _slice(_GPU[row["kind"]], names[row["name"]], row, row["device"], row["stream"], _gpu_args(row))
    for row in rows_of(capture.calls):
        args = {"correlation": row["correlation"]}
        yield _slice("cuda_runtime", names[row["name"]], row, row["process"], row["thread"], args)
    for row in rows_of(capture.ranges):
        if row["kind"] in _RANGES and row["end"] != c.UNKNOWN:
            operator = capture.names[row["domain"]] == "cpu_op" if row["domain"] >= 0 else False
            category = "cpu_op" if operator else _RANGES[row["kind"]]
            yield _slice(category, names[row["text"]], row, row["process"], row["thread"], {})
    for row in rows_of(capture.syncs):
        name = json.dumps(_SYNCS.get(row["kind"], _OTHER_SYNC))
        yield _slice("cuda_sync", name, row, row["device"], row["stream"], _sync_args(row))
    for row in rows_of(capture.spans[capture.spans["kind"] == c.OVERHEAD]):
        yield _slice("overhead", '"Overhead"', row, row["process"], row["thread"], {})


def _slice(category: str, name: str, row: Event, process: int, thread: int, args: Event) -> str:
    times = f'"ts": {_us(row["start"])}, "dur": {_us(row["end"] - row["start"])}'
    return (
        f'{{"ph": "X", "cat": "{category}", "name": {name}, "pid": {process}, "tid": {thread}, {times}, '
        f'"args": {json.dumps(args)}}}'
    )


def _gpu_args(row: Event) -> Event:
    args = {"device": row["device"], "stream": row["stream"], "correlation": row["correlation"]}
    if row["graph_node"] > 0:
        args["graph node id"] = row["graph_node"]
    if row["bytes"]:
        args["bytes"] = row["bytes"]
    if row["role"] != c.UNSET_ROLE:
        args["eplb role"] = row["role"]
    args |= {f"eplb {name}": row[name] for name in ("layer", "iteration") if row[name] != c.UNKNOWN}
    return args


def _sync_args(row: Event) -> Event:
    args = {"stream": row["stream"], "device": row["device"], "correlation": row["correlation"]}
    if row["on_stream"] != c.UNKNOWN:
        args["wait_on_stream"] = row["on_stream"]
    if row["on_correlation"] != c.UNKNOWN:
        args["wait_on_cuda_event_record_corr_id"] = row["on_correlation"]
    return args


def _us(ns: int) -> str:
    """Microseconds with three decimals, without a detour over floating point."""
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // 1000}.{abs(ns) % 1000:03d}"
