"""Everything that a run left behind, loaded once: scenario, provenance, evidence of all ranks, and the trace."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from moe_eplb.analysis.trace import Trace, read_trace
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import TraceError
from moe_eplb.core.evidence import Row, read_evidence
from moe_eplb.core.input_file import read_input
from moe_eplb.core.scenario import Scenario

__all__ = ["Evidence", "EvidenceRow", "Place", "RunFolder", "load"]

EvidenceRow = dict[str, Any]

_SEVERAL = frozenset({Row.ATTEST})
"""Kinds of which a rank leaves several rows at one place: slots are read after a commit and, at the end, once more."""


class Place(NamedTuple):
    """Where in a run: a layer in an iteration."""

    layer: int
    iteration: int

    def __str__(self) -> str:
        return f"layer {self.layer}, iteration {self.iteration}"


class Evidence:
    """The rows of all ranks by kind, each kind in rank order and, within a rank, as written."""

    def __init__(self, rows: Iterable[EvidenceRow]) -> None:
        self._rows: dict[str, list[EvidenceRow]] = defaultdict(list)
        for row in rows:
            self._rows[row["row"]].append(row)
        self._places: dict[Row, dict[Place, dict[int, EvidenceRow]]] = {}

    def rows(self, kind: Row) -> list[EvidenceRow]:
        """All rows of a kind."""
        return self._rows.get(kind.value, [])

    def by_place(self, kind: Row) -> dict[Place, dict[int, EvidenceRow]]:
        """Rows of a kind by layer and iteration, then by rank; a later row of the same rank replaces an earlier one.

        That there was an earlier one, `repeated` says.
        """
        if kind not in self._places:
            places: dict[Place, dict[int, EvidenceRow]] = defaultdict(dict)
            for row in self.rows(kind):
                places[Place(row["layer"], row["iteration"])][row["rank"]] = row
            self._places[kind] = dict(sorted(places.items(), key=lambda item: (item[0].iteration, item[0].layer)))
        return self._places[kind]

    def repeated(self, kind: Row) -> list[tuple[Place, int]]:
        """Places and ranks where a rank left more rows of a kind than one.

        Each scripted call is a place of its own, and so is each update: several may be given up in one iteration.
        """
        if kind in _SEVERAL:
            return []
        seen = Counter(
            (Place(row["layer"], row["iteration"]), row["rank"], row.get("index"), row.get("due"))
            for row in self.rows(kind)
        )
        return [(place, rank) for (place, rank, *_), rows in seen.items() if rows > 1]


@dataclass(frozen=True)
class RunFolder:
    """A loaded run folder. `trace` is None when the run left none."""

    path: Path
    scenario: Scenario
    meta: dict[str, Any]
    evidence: Evidence
    trace: Trace | None

    @property
    def failed(self) -> bool:
        """Whether the run ended before its end, so that what is not there may never have been due."""
        return self.meta.get("state") != "finished"

    @property
    def scripted(self) -> bool:
        """Whether the run was a list of calls instead of a model."""
        return self.scenario.calls is not None

    @property
    def dynamic(self) -> bool:
        """Whether the scenario says that experts move."""
        return self.scenario.balancer_off_reason() is None

    @property
    def moving(self) -> bool:
        """Whether a model ran whose experts move."""
        return self.dynamic and not self.scripted

    @property
    def dynamic_layers(self) -> int:
        """How many layers must run in every iteration for the balancer; 0 in static routing."""
        return self.scenario.model.layers if self.dynamic else 0

    @property
    def ranks(self) -> range:
        """The ranks that must have left evidence."""
        return range(self.scenario.ranks)

    @cached_property
    def placements(self) -> dict[Place, dict[int, EvidenceRow]]:
        """Placement rows by place and rank, each with its ``slots``, which ranks write down only when they change.

        A row whose slots were never written is left out.
        """
        known: dict[tuple[int, int, int], list[int]] = {}
        filled: dict[Place, dict[int, EvidenceRow]] = {}
        for place, rows in self.evidence.by_place(Row.PLACEMENT).items():
            for rank, row in rows.items():
                key = (rank, place.layer, row["digest"])
                if "slots" in row:
                    known[key] = row["slots"]
                if key in known:
                    filled.setdefault(place, {})[rank] = row | {"slots": known[key]}
        return filled

    @cached_property
    def places(self) -> list[Place]:
        """Every layer of every iteration."""
        layers = self.scenario.model.layers
        return [Place(layer, iteration) for iteration in range(self.scenario.iterations) for layer in range(layers)]


def load(path: Path) -> RunFolder:
    """Load a run folder.

    Raises:
        TraceError: the folder or a needed file is missing, truncated or damaged.
        ScenarioError: its scenario is not acceptable.
    """
    if not path.is_dir():
        raise TraceError("E057", "there is no such run folder", where=str(path))
    scenario_path = path / "scenario.yaml"
    if not scenario_path.is_file():
        raise TraceError(
            "E057", "this is no run folder: it holds no scenario.yaml", where=str(path),
            hint="give the folder that a run wrote, the one with scenario.yaml and events.rank0.bin",
        )  # fmt: skip
    trace_path = path / "trace.sqlite"
    meta = _read_meta(path / "meta.json")
    _require_same_scenario(scenario_path, meta)
    return RunFolder(
        path=path,
        scenario=scenarios.load(scenario_path, check_files=False),
        meta=meta,
        evidence=Evidence(row for rank, file in _evidence_files(path) for row in _rows_of(rank, file)),
        trace=read_trace(trace_path) if os.path.lexists(trace_path) else None,
    )


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(read_input(path))
    except FileNotFoundError as error:
        raise TraceError("E057", "this is no complete run folder: meta.json is missing", where=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise TraceError("E054", "meta.json is damaged", why=why, where=str(path)) from error
    if not isinstance(meta, dict):
        raise TraceError("E054", "meta.json is no object", why=type(meta).__name__, where=str(path))
    return meta


def _require_same_scenario(path: Path, meta: dict[str, Any]) -> None:
    """A scenario that was cut off may still be one, with fewer checks than the run was made for."""
    expected = meta.get("scenario_sha256")  # a run of an earlier version says nothing
    if expected is not None and hashlib.sha256(read_input(path)).hexdigest() != expected:
        raise TraceError(
            "E059", "scenario.yaml is not the one that was run", where=str(path),
            hint="to judge by other checks, run the scenario again with them",
        )  # fmt: skip


def _rows_of(rank: int, file: Path) -> Iterator[EvidenceRow]:
    for row in read_evidence(file):
        if row["rank"] != rank:
            why = f"a row of rank {row['rank']}"
            raise TraceError("E050", "an evidence file holds another rank's row", why=why, where=str(file))
        yield row


def _evidence_files(path: Path) -> list[tuple[int, Path]]:
    def rank_of(file: Path) -> int:
        match = re.fullmatch(r"evidence\.rank(\d+)\.jsonl", file.name)
        if match is None:
            raise TraceError("E050", "an evidence file has no rank in its name", where=str(file))
        return int(match[1])

    return sorted((rank_of(file), file) for file in path.glob("evidence.rank*.jsonl"))
