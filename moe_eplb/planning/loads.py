"""Recorded loads, in the terms of this project and of no other's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import ScenarioError, UsageError

__all__ = [
    "MOST_TOKENS", "LoadSet", "LossReport", "Numbered", "Origin", "bad_content", "layers_text", "require_numbers",
    "slots_counted",
]  # fmt: skip

MOST_TOKENS = 1 << 44
"""Of one count; their sums over layers and windows stay exact in int64, and in float64 for a layer."""


@dataclass(frozen=True, slots=True)
class LossReport:
    """What a format cannot hold and what was left out, in words.

    Attributes:
        form: The format's name, empty if there was no file.
        lost: What the format has no place for: after reading it is unknown, after writing it is gone.
        left_out: What the file has and is not kept.
    """

    lost: tuple[str, ...] = ()
    form: str = ""
    left_out: tuple[str, ...] = ()


class Numbered(Protocol):
    """Something of layers: their numbers, and whether these are the model's own."""

    @property
    def layer_ids(self) -> tuple[int, ...]: ...

    @property
    def numbered(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a recording beside its counts; None or "" where it is not.

    Attributes:
        iterations: The iteration or forward pass [W] that each window is or begins with.
        in_order: Whether the windows are in the order of time.
        ranks: How many ranks' counts were summed.
        top_k: K.
        phase: Such as "prefill" or "decode".
        model: The model's name.
    """

    iterations: tuple[int, ...] | None = None
    in_order: bool | None = None
    ranks: int | None = None
    top_k: int | None = None
    phase: str = ""
    model: str = ""


@dataclass(frozen=True, eq=False)
class LoadSet:
    """Loads of one model.

    Attributes:
        counts: Routed (token, k) pairs of each expert in each window, int64 [W, L, E].
        layer_ids: The number of each layer.
        source: The file and what wrote it.
        notes: What a reader had to assume or left out.
        numbered: Whether `layer_ids` are the model's own numbers, dense layers counted too. If not, they count the
            layers with experts from 0.
        origin: What else is known of the recording.
        read: What the format that it was read from does not hold.
    """

    counts: NDArray[np.int64]
    layer_ids: tuple[int, ...]
    source: str
    notes: Sequence[str] = field(default_factory=tuple)
    numbered: bool = True
    origin: Origin = Origin()
    read: LossReport = LossReport()

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or 0 in self.counts.shape:
            raise bad_content(self.source, "loads must be [windows, layers, experts]", f"{list(self.counts.shape)}")
        if self.counts.dtype.kind not in "iu" or int(self.counts.min()) < 0:
            why = f"{self.counts.dtype}, the lowest is {self.counts.min()}"
            raise bad_content(self.source, "loads must be whole numbers that are not negative", why)
        if int(self.counts.max()) > MOST_TOKENS:
            raise bad_content(self.source, "a count is larger than any recording's", f"it is {self.counts.max()}")
        if len(self.layer_ids) != self.counts.shape[1] or len(set(self.layer_ids)) != len(self.layer_ids):
            why = f"{len(set(self.layer_ids))} numbers for {self.counts.shape[1]} layers"
            raise bad_content(self.source, "every layer needs a number of its own", why)
        if min(self.layer_ids) < 0:
            raise bad_content(self.source, "layers are counted from 0", f"one is {min(self.layer_ids)}")
        times = self.origin.iterations
        if times is not None and len(times) != self.windows:
            why = f"{len(times)} iterations for {self.windows} windows"
            raise bad_content(self.source, "every window needs an iteration", why)

    @property
    def windows(self) -> int:
        """W."""
        return int(self.counts.shape[0])

    def merged(self, size: int) -> LoadSet:
        """Sums of so many windows each, of all for 0; the oldest ones that fill no sum are left out.

        Raises:
            UsageError: E195 there are fewer windows.
        """
        size = size or self.windows
        if size > self.windows:
            raise UsageError("E195", f"{size} windows cannot be summed", why=f"there are {self.windows}")
        left = self.windows % size
        counts = self.counts[left:].reshape(-1, size, *self.counts.shape[1:]).sum(axis=1)
        notes = (
            (*self.notes, f"the {left} first windows fill no sum of {size} and are left out") if left else self.notes
        )
        times = self.origin.iterations
        origin = replace(self.origin, iterations=None if times is None else times[left::size])
        return replace(self, counts=counts, notes=notes, origin=origin)

    def numbered_as(self, layer_ids: tuple[int, ...]) -> LoadSet:
        """The same with the model's own numbers of its layers.

        Raises:
            UsageError: E195 there are not as many, or the file has other ones.
        """
        require_numbers(self, layer_ids)
        return replace(self, layer_ids=layer_ids, numbered=True)


def require_numbers(found: Numbered, layer_ids: tuple[int, ...]) -> None:
    """E195 unless these can be the numbers of the layers that were found."""
    if len(layer_ids) != len(found.layer_ids) or len(set(layer_ids)) != len(layer_ids):
        why = f"{len(set(layer_ids))} numbers for {len(found.layer_ids)} layers"
        raise UsageError("E195", "these are not the layers of the file", why=why, hint="give each layer a number")
    if found.numbered and layer_ids != found.layer_ids:
        why = f"{layers_text(found.layer_ids)} in the file, {layers_text(layer_ids)} asked for"
        raise UsageError("E195", "the file numbers its layers itself", why=why, hint="leave the numbers out")


def slots_counted(source: str, counted: int, experts: int) -> ScenarioError:
    """The error for TensorRT-LLM's statistics of a run in which its balancer was on."""
    return ScenarioError(
        "E198", "these are counts of slots, not of experts", where=source,
        why=f"{counted} are counted, there are {experts} experts: the balancer (EPLB) was on when they were recorded",
        hint="record again without a load balancer configuration, which counts experts, or correct their number",
    )  # fmt: skip


def layers_text(layer_ids: Sequence[int]) -> str:
    """Numbers in short: ``3-60`` or ``0,7,15``."""
    parts: list[list[int]] = []
    for number in layer_ids:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1:] = [number] if len(parts[-1]) > 1 else [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def bad_content(source: object, what: str, why: str, hint: str = "") -> ScenarioError:
    """E041: a file can be read, but is not what it should be."""
    return ScenarioError("E041", what, why=why, hint=hint, where=str(source))
