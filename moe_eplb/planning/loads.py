"""Recorded loads and placements, in the terms of this project and of no other's files."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.core import recorded
from moe_eplb.core.errors import ScenarioError, UsageError
from moe_eplb.core.input_file import read_input

__all__ = ["LoadSet", "LossReport", "PlacementSet", "read_counts", "require_fit"]

_MOST_JSON = 256 << 20
RUN_LOADS = "loads.npz"
"""Name of the loads in a run folder."""


@dataclass(frozen=True, eq=False)
class LoadSet:
    """Loads of one model.

    Attributes:
        counts: Routed (token, k) pairs of each expert in each window, int64 [W, L, E].
        layer_ids: The model's own number of each layer, dense ones counted too.
        source: The file and what wrote it.
        notes: What a reader had to assume or left out.
    """

    counts: NDArray[np.int64]
    layer_ids: tuple[int, ...]
    source: str
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or 0 in self.counts.shape:
            raise _bad(self.source, "loads must be [windows, layers, experts]", f"{list(self.counts.shape)}")
        if self.counts.dtype.kind not in "iu" or int(self.counts.min()) < 0:
            raise _bad(self.source, "loads must be whole numbers that are not negative", str(self.counts.dtype))
        if len(self.layer_ids) != self.counts.shape[1] or len(set(self.layer_ids)) != len(self.layer_ids):
            why = f"{len(set(self.layer_ids))} numbers for {self.counts.shape[1]} layers"
            raise _bad(self.source, "every layer needs a number of its own", why)

    @property
    def windows(self) -> int:
        """W."""
        return int(self.counts.shape[0])

    def chosen(self, first: int, last: int) -> LoadSet:
        """The windows from `first` to `last`, both in it."""
        return LoadSet(self.counts[first : last + 1], self.layer_ids, self.source, self.notes)


@dataclass(frozen=True, eq=False)
class PlacementSet:
    """The expert of each slot int32 [L, P] of the layers `layer_ids`; slot s lies on rank s // (P / R)."""

    slots: NDArray[np.int32]
    ranks: int
    experts: int
    layer_ids: tuple[int, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class LossReport:
    """What a format could not hold, in words."""

    lost: tuple[str, ...] = ()


def read_counts(path: Path, *, tokens_per_window: int = 4096) -> LoadSet:
    """Loads of a run folder, of an ``.npz``, or of SGLang's JSON.

    An ``.npz`` holds ``counts`` [windows, layers, experts] or ``topk_ids`` [tokens, layers, K], which become windows of
    so many tokens; those after the last full one are left out. SGLang's ``--init-expert-location`` holds
    ``logical_count`` of every layer, or of every step and layer; layers whose rows are all zero are dense and left out.

    Raises:
        ScenarioError: E040, E041 the file cannot be read or is of another kind, see `moe_eplb.core.recorded`.
    """
    file = path / RUN_LOADS if path.is_dir() else path
    if file.suffix == ".json":
        return _of_sglang(file)
    found = recorded.load(file)
    if found.counts is not None:
        return LoadSet(found.counts.astype(np.int64), _layer_ids(file, found.layers), str(path))
    ids = found.topk_ids
    assert ids is not None
    full = len(ids) // tokens_per_window
    if not full:
        hint = f"use --tokens-per-window {len(ids)} or fewer"
        raise _bad(str(path), "the file has fewer tokens than one window", f"{len(ids)} of {tokens_per_window}", hint)
    counts = np.zeros((full, found.layers, found.experts), np.int64)
    for window in range(full):
        part = ids[window * tokens_per_window : (window + 1) * tokens_per_window]
        for layer in range(found.layers):
            counts[window, layer] = np.bincount(part[:, layer].reshape(-1), minlength=found.experts)
    left = len(ids) - full * tokens_per_window
    notes = (f"{left} tokens after the last full window are left out",) if left else ()
    return LoadSet(counts, _layer_ids(file, found.layers), str(path), notes)


def _of_sglang(path: Path) -> LoadSet:
    try:
        data = orjson.loads(read_input(path, _MOST_JSON))
    except (OSError, ValueError) as error:
        raise ScenarioError("E040", "the loads cannot be read", why=str(error), where=str(path)) from error
    rows = data.get("logical_count") if isinstance(data, dict) else None
    try:
        found = np.array(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise _bad(str(path), "'logical_count' is no table of numbers", str(error)) from error
    found = found[np.newaxis] if found.ndim == 2 else found
    if found.ndim != 3 or not np.isfinite(found).all() or (found != np.rint(found)).any() or (found < 0).any():
        why = f"'logical_count' of shape {list(found.shape)}"
        raise _bad(str(path), "loads are whole numbers by layer and expert that are not negative", why)
    routed = np.flatnonzero(found.sum(axis=(0, 2)) > 0)
    if not len(routed):
        raise _bad(str(path), "no layer has any load", f"{found.shape[1]} layers")
    dense = found.shape[1] - len(routed)
    notes = (f"{dense} layers without any load are taken for dense ones",) if dense else ()
    return LoadSet(found[:, routed].astype(np.int64), tuple(routed.tolist()), str(path), notes)


def _layer_ids(path: Path, layers: int) -> tuple[int, ...]:
    """The file's own numbers of its layers; counted from 0 where it has none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            numbers = file["layer_ids"] if "layer_ids" in file.files else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _bad(str(path), "the layers' numbers cannot be read", str(error)) from error
    if numbers is None:
        return tuple(range(layers))
    if numbers.shape != (layers,) or numbers.dtype.kind not in "iu":
        raise _bad(str(path), "'layer_ids' does not fit the loads", f"{numbers.dtype} {list(numbers.shape)}")
    return tuple(int(number) for number in numbers)


def require_fit(loads: LoadSet, placement: PlacementSet) -> PlacementSet:
    """A placement of the layers of loads, in their order; rows by order alone are taken for them.

    Raises:
        UsageError: E195 it is of other layers or experts.
    """
    if placement.layer_ids == tuple(range(len(loads.layer_ids))):
        placement = replace(placement, layer_ids=loads.layer_ids)
    rows = dict(zip(placement.layer_ids, placement.slots, strict=True))
    if set(loads.layer_ids) < set(rows):  # dense layers have rows in some forms
        placement = replace(
            placement, layer_ids=loads.layer_ids, slots=np.stack([rows[layer] for layer in loads.layer_ids])
        )
    if placement.layer_ids != loads.layer_ids or placement.experts != loads.counts.shape[2]:
        why = (
            f"{len(placement.layer_ids)} layers of {placement.experts} experts there, "
            f"{len(loads.layer_ids)} of {loads.counts.shape[2]} in the loads"
        )
        raise UsageError("E195", "the placement is not one of these layers and experts", why=why)
    return placement


def _bad(source: str, what: str, why: str, hint: str = "") -> ScenarioError:
    return ScenarioError("E041", what, why=why, hint=hint, where=source)
