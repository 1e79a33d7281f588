"""SGLang's expert-distribution dumps, as its recorder writes them with ``torch.save``.

Mode ``stat``: one file, ``logical_count`` [steps, layers, E], summed over ranks. Mode ``per_pass``: a file for each
rank, ``records`` with ``global_physical_count`` [layers, P] of a forward pass, and ``last_physical_to_logical_map``
[layers, P]. ``layers`` are all of the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_eplb.planning.formats.files import MOST_NUMBERS, brief, whole_numbers
from moe_eplb.planning.formats.sglang import all_layers, of_all_layers
from moe_eplb.planning.formats.torch_file import array_of, save_torch
from moe_eplb.planning.loads import LoadSet, Origin, bad_content

__all__ = ["is_per_pass", "per_pass_loads", "placement_rows", "stat_loads", "write_stat"]

_MAP, _COUNT = "last_physical_to_logical_map", "global_physical_count"


class _Dump(NamedTuple):
    """A rank's file: its number, the map int64 [layers, P], counts int64 [layers, P] by pass, whether it has tokens."""

    rank: int
    slots: NDArray[np.int64]
    passes: dict[int, NDArray[np.int64]]
    tokens: bool


@dataclass
class _Job:
    """The sum of the ranks' files so far: no more than one of them is in memory beside it."""

    source: Path
    ranks: list[int] = field(default_factory=list)
    slots: NDArray[np.int64] | None = None
    total: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    seen: Counter[int] = field(default_factory=Counter)
    tokens: bool = False

    def add(self, path: Path, dump: _Dump) -> None:
        """Add a rank's file; E041 if it is there twice or has another placement."""
        if dump.rank in self.ranks:
            why, hint = f"rank {dump.rank}", "keep the files of one dump in the folder"
            raise bad_content(self.source, "a rank has several files", why, hint)
        if self.slots is not None and not np.array_equal(dump.slots, self.slots):
            raise bad_content(path, "the ranks' placements differ", f"ranks {self.ranks[0]} and {dump.rank}")
        self.slots = dump.slots
        self.ranks.append(dump.rank)
        self.tokens |= dump.tokens
        self.seen.update(dump.passes.keys())
        for number, counts in dump.passes.items():
            self.total[number] = self.total[number] + counts if number in self.total else counts
        if sum(counts.size for counts in self.total.values()) > MOST_NUMBERS:
            raise bad_content(self.source, "the recording is too large", f"more than {MOST_NUMBERS} counts")

    def common(self) -> list[int]:
        """The passes that all ranks have; E041 if there are none, or ranks are missing."""
        ranks = sorted(self.ranks)
        if len(ranks) > 1 and ranks != list(range(len(ranks))):
            missing = sorted(set(range(ranks[-1] + 1)) - set(ranks))[:8]
            raise bad_content(self.source, f"the files of ranks {missing} are missing", f"there are {ranks}"[:120])
        common = sorted(number for number, times in self.seen.items() if times == len(ranks))
        if not common:
            raise bad_content(self.source, "no forward pass is in the files of all ranks", f"{len(self.seen)} passes")
        return common


def is_per_pass(data: Any) -> bool:
    """Whether the content of a file is that of one rank."""
    return isinstance(data, dict) and "records" in data


def stat_loads(path: Path, data: Any) -> LoadSet:
    """Loads from a dump of mode ``stat``, or from a ``logical_count`` that was saved for ``--init-expert-location``."""
    if not isinstance(data, dict) or "logical_count" not in data:
        keys = [brief(key) for key in data] if isinstance(data, dict) else []
        why = f"keys {', '.join(keys)[:80]}" if keys else brief(data)
        raise bad_content(path, "this is no dump of SGLang's recorder", why)
    found = array_of(path, "logical_count", data["logical_count"])
    counts = whole_numbers(path, "logical_count", found[np.newaxis] if found.ndim == 2 else found, 3)
    used = counts.any(axis=(1, 2))
    notes = (f"{int((~used).sum())} steps without any load were never filled",) if not used.all() else ()
    if not used.any():
        raise bad_content(path, "no step has any load", f"{len(counts)} steps")
    if len(counts) > 1 and used.all():
        notes = ("a full ring of steps begins anywhere: the order of the windows may be rotated",)
    return of_all_layers(path, counts[used], notes=notes)


def write_stat(loads: LoadSet) -> dict[str, bytes]:
    """A dump of mode ``stat``, with every window as a step."""
    data = {"rank": 0, "logical_count": all_layers(loads), "average_utilization_rate_over_window": None}
    return {"": save_torch(data)}


def per_pass_loads(files: Iterable[tuple[Path, Any]], source: Path) -> LoadSet:
    """Loads from the dumps of mode ``per_pass`` of all ranks: one window for each forward pass that all of them have.

    Args:
        files: Paths and what was in them, one after the other.
        source: What to call them together.

    Raises:
        ScenarioError: E041 ranks are missing or there twice, or their maps differ.
    """
    job = _Job(source)
    for path, data in files:
        job.add(path, _dump(path, data))
    common, slots = job.common(), job.slots
    assert slots is not None
    experts = int(slots.max()) + 1
    notes = ["counts of slots are given to experts by the last placement: those from before it changed are wrong"]
    if len(job.seen) > len(common):
        notes.append(f"{len(job.seen) - len(common)} forward passes that some ranks lack are left out")
    if job.tokens:
        notes.append("the choices of each token (mode per_token) are there, but not kept")
    if len(job.ranks) == 1:
        notes.append(f"the counts are those of rank {job.ranks[0]} alone: give the folder with all ranks' files")
    windows = np.stack([_by_expert(job.total[one], slots, experts) for one in common])
    origin = Origin(iterations=tuple(common), in_order=True, ranks=len(job.ranks))
    return of_all_layers(source, windows, origin, tuple(notes))


def placement_rows(path: Path, data: Any) -> list[list[int]] | None:
    """The rows of the placement that a file holds, None if it holds none."""
    if not isinstance(data, dict):
        return None
    key = next((key for key in ("physical_to_logical_map", _MAP) if key in data), None)
    if key is None:
        return None
    rows: list[list[int]] = whole_numbers(path, key, array_of(path, key, data[key]), 2).tolist()
    return rows


def _dump(path: Path, data: Any) -> _Dump:
    records = data.get("records") if isinstance(data, dict) else None
    if not isinstance(records, list) or not records or _MAP not in data:
        raise bad_content(path, "this is no dump of mode per_pass", f"'records' and {_MAP!r} are needed")
    slots = whole_numbers(path, _MAP, array_of(path, _MAP, data[_MAP]), 2)
    _require_placement(path, slots)
    passes: dict[int, NDArray[np.int64]] = {}
    seen: set[tuple[int, str]] = set()
    rank = -1
    for record in records:
        number, key, counts = _record(path, record, slots.shape)
        if (number, key) in seen:
            raise bad_content(path, f"forward pass {number} is there twice", f"gatherer_key {key:.40}")
        seen.add((number, key))
        found = record.get("rank")
        if type(found) is not int or not 0 <= found < 1 << 20 or rank not in (-1, found):
            why = f"rank {rank} before, then {brief(found)}" if rank >= 0 else brief(found)
            raise bad_content(path, "a file holds the records of one rank", why)
        rank = found
        passes[number] = passes[number] + counts if number in passes else counts
        if len(passes) * counts.size > MOST_NUMBERS:
            raise bad_content(path, "the recording is too large", f"more than {MOST_NUMBERS} counts")
    return _Dump(rank, slots, passes, any("topk_ids_of_layer" in record for record in records))


def _record(path: Path, record: Any, shape: tuple[int, ...]) -> tuple[int, str, NDArray[np.int64]]:
    number = record.get("forward_pass_id") if isinstance(record, dict) else None
    if type(number) is not int or not 0 <= number < 1 << 62 or _COUNT not in record:
        raise bad_content(path, "a record lacks its forward_pass_id or its counts", f"{_COUNT!r} is needed")
    counts = whole_numbers(path, _COUNT, array_of(path, _COUNT, record[_COUNT]), 2)
    if counts.shape != shape:
        raise bad_content(path, f"{_COUNT!r} does not fit the map", f"{list(counts.shape)} and {list(shape)}")
    key = record.get("gatherer_key")
    return number, key if isinstance(key, str) else "", counts


def _require_placement(path: Path, slots: NDArray[np.int64]) -> None:
    """That every layer has a slot for every expert."""
    experts = int(slots.max()) + 1
    if experts > slots.shape[1] or any(len(np.unique(row)) != experts for row in slots):
        why = f"ids up to {experts - 1} in {slots.shape[1]} slots"
        raise bad_content(path, f"{_MAP!r} leaves experts without a slot", why)


def _by_expert(counts: NDArray[np.int64], slots: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """Counts int64 [layers, E] from those of slots [layers, P]."""
    made = np.zeros((len(slots), experts), np.int64)
    np.add.at(made, (np.arange(len(slots))[:, np.newaxis], slots), counts)
    return made
