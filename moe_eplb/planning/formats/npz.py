"""Our own ``.npz``, and the loads of run folders: ``counts`` [W, L, E] or ``topk_ids`` [tokens, L, K]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from moe_eplb.core import recorded
from moe_eplb.core.input_file import open_input
from moe_eplb.planning.formats.files import MOST_NUMBERS, unreadable, whole_numbers
from moe_eplb.planning.loads import LoadSet, Origin, bad_content

__all__ = ["RUN_LOADS", "counts_of", "has_tokens", "tokens_of", "write_loads"]

RUN_LOADS = "loads.npz"
"""Name of the loads in a run folder."""


def has_tokens(path: Path) -> bool:
    """Whether the file holds the choices of each token instead of counts; E040 if it cannot be read."""
    try:
        with open_input(path) as stream, np.load(stream, allow_pickle=False) as file:
            return "topk_ids" in file.files
    except recorded.UNREADABLE as error:
        raise unreadable(path, error) from error


def counts_of(path: Path, source: Path, in_order: bool | None = None) -> LoadSet:
    """Loads from a file of counts.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it does not hold what it should.
    """
    found = recorded.load(path, idle=True)
    if found.counts is None:
        raise bad_content(path, "the file holds no counts", "it holds the choices of tokens")
    ids = _layer_ids(path, found)
    counts = whole_numbers(path, "counts", found.counts, 3)
    return LoadSet(counts, ids or tuple(range(found.layers)), str(source), (), bool(ids), Origin(in_order=in_order))


def tokens_of(path: Path, tokens_per_window: int) -> LoadSet:
    """Loads from a file of choices, in windows of so many tokens; those after the last full one are left out.

    Raises:
        ScenarioError: See `counts_of`.
    """
    found = recorded.load(path)
    chosen = found.topk_ids
    if chosen is None:
        raise bad_content(path, "the file holds no choices of tokens", "it holds counts")
    full = len(chosen) // tokens_per_window
    if not full:
        why, hint = f"{len(chosen)} of {tokens_per_window}", f"use --tokens-per-window {len(chosen)} or fewer"
        raise bad_content(path, "the file has fewer tokens than one window", why, hint)
    if full * found.layers * found.experts > MOST_NUMBERS:
        why, hint = (
            f"{full} windows, {found.layers} layers, {found.experts} experts",
            "use a larger --tokens-per-window",
        )
        raise bad_content(path, "there would be too many counts", why, hint)
    counts = np.zeros((full, found.layers, found.experts), np.int64)
    for window in range(full):
        part = chosen[window * tokens_per_window : (window + 1) * tokens_per_window]
        for layer in range(found.layers):
            counts[window, layer] = np.bincount(part[:, layer].reshape(-1), minlength=found.experts)
    left = len(chosen) - full * tokens_per_window
    notes = (f"{left} tokens after the last full window are left out",) if left else ()
    ids = _layer_ids(path, found)
    origin = Origin(in_order=True, top_k=found.top_k)
    return LoadSet(counts, ids or tuple(range(found.layers)), str(path), notes, bool(ids), origin)


def write_loads(loads: LoadSet) -> dict[str, bytes]:
    """The file's content; without layers' numbers where they are not known."""
    numbers = {"layer_ids": np.array(loads.layer_ids)} if loads.numbered else {}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, counts=loads.counts, **numbers)
    return {"": buffer.getvalue()}


def _layer_ids(path: Path, found: recorded.Recorded) -> tuple[int, ...]:
    """The file's own numbers of its layers; none where it has none."""
    numbers = found.layer_ids
    if numbers is None:
        return ()
    if numbers.shape != (found.layers,) or numbers.dtype.kind not in "iu":
        raise bad_content(path, "'layer_ids' does not fit the loads", f"{numbers.dtype} {list(numbers.shape)}")
    return tuple(int(number) for number in numbers)
