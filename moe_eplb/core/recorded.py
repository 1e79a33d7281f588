"""Recorded expert choices as a workload: files of ids of every token, or of counts per window.

An ``.npz`` file holds either ``topk_ids``, integer [tokens, layers, K] with distinct experts per token, or ``counts``,
integer [windows, layers, experts]. Beside ``topk_ids`` it may hold ``sequence_id`` [tokens] and ``num_experts``.
"""

from __future__ import annotations

import bisect
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.input_file import open_input
from moe_eplb.core.workload_tokens import tokens_before

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["UNREADABLE", "Recorded", "check", "in_order", "load", "quietly"]

_ARRAYS = ("topk_ids", "counts", "sequence_id", "num_experts", "layer_ids")
_MOST_BYTES = 4 << 30  # of all arrays; a few packed bytes may say that they unpack to any number
# What numpy and zipfile raise on a damaged archive: RuntimeError is an encrypted one, SyntaxError and TokenError a
# damaged header, MemoryError and OverflowError a header that promises too much.
UNREADABLE = (
    OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError,
    SyntaxError, tokenize.TokenError, MemoryError, OverflowError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Recorded:
    """One file. Exactly one of `topk_ids` int32 [tokens, layers, K] and `counts` int64 [windows, layers, E] is given.

    `experts` of a file of ids is what the file says, else the highest id + 1; `top_k` of a file of counts is 0.
    `layer_ids` are the model's own numbers of the layers, as they stand in the file.
    """

    topk_ids: np.ndarray | None
    counts: np.ndarray | None
    experts: int
    layers: int
    top_k: int
    sequence_id: np.ndarray | None = None
    experts_known: bool = True
    layer_ids: np.ndarray | None = None


def load(path: str | Path, *, idle: bool = False) -> Recorded:
    """Read and check a file; E040 when it cannot be read, E041 when its content is not as described.

    Args:
        idle: Whether a layer may have no count in a window; as a workload it could not be drawn from.
    """
    arrays = _arrays(Path(path))
    kinds = [key for key in ("topk_ids", "counts") if key in arrays]
    if len(kinds) != 1:
        why = f"it holds {', '.join(sorted(arrays)) or 'nothing'}"
        raise _bad(path, "the file must hold either 'topk_ids' or 'counts'", why)
    for key in kinds:
        if arrays[key].ndim != 3 or arrays[key].dtype.kind not in "iu" or 0 in arrays[key].shape:
            why = f"{arrays[key].dtype} {list(arrays[key].shape)}"
            raise _bad(path, f"{key!r} must be integers in three dimensions, none of them empty", why)
    return _of_ids(path, arrays) if kinds == ["topk_ids"] else _of_counts(path, arrays, idle)


@contextmanager
def quietly() -> Iterator[None]:
    """Without numpy's warning that a header is not as it writes it itself: such a file is read, or refused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Reading `.npy`")
        yield


def in_order(file: Recorded, order: str) -> np.ndarray:
    """The ids int32 [tokens, layers, K] as they stand ("file"), or by position within their sequence and then by
    sequence ("position"), so that the sequences decode side by side."""
    assert file.topk_ids is not None, "only a file of ids has an order"
    if order == "file":
        return file.topk_ids
    if file.sequence_id is None:
        raise ScenarioError("E041", "order 'position' needs 'sequence_id' in the file", hint="use order 'file'")
    _, sequence, length = np.unique(file.sequence_id, return_inverse=True, return_counts=True)
    by_sequence = np.argsort(sequence, kind="stable")
    position = np.empty(len(sequence), dtype=np.int64)
    position[by_sequence] = np.arange(len(sequence)) - np.repeat(np.cumsum(length) - length, length)
    ordered: np.ndarray = file.topk_ids[np.lexsort((sequence, position))]
    return ordered


def check(scenario: Scenario) -> None:
    """That the file of a recorded workload fits the model and lasts for all iterations; E041 and E042 if not."""
    path = scenario.workload.path
    if scenario.workload.kind != "recorded" or path is None:
        return
    file, model = load(path), scenario.model
    wanted = {"layers": model.layers, "experts": model.experts, "top_k": model.top_k}
    unfit = {name: n for name, n in wanted.items() if _unfit(file, name, n)}
    wrong = [f"{name} {getattr(file, name)} in the file, {n} in the model" for name, n in unfit.items()]
    if wrong:
        raise _bad(path, "the recorded file does not fit the model", "; ".join(wrong))
    if file.topk_ids is not None:
        in_order(file, scenario.workload.order)
        _check_length(scenario, len(file.topk_ids), path)


def _unfit(file: Recorded, name: str, wanted: int) -> bool:
    if name == "layers":
        return file.layers < wanted
    if name == "experts":
        return file.experts != wanted if file.experts_known else file.experts > wanted
    return file.top_k not in (0, wanted)


def _check_length(scenario: Scenario, tokens: int, path: str) -> None:
    wanted, counted = scenario.iterations, range(1, scenario.iterations + 1)
    fit = bisect.bisect_right(counted, tokens, key=lambda iterations: tokens_before(scenario, iterations))
    if fit < wanted:
        needed = tokens_before(scenario, wanted)
        why = f"{tokens} of the {needed} tokens that are needed: {fit} iterations fit, {wanted} are asked for"
        hint = f"iterations: {fit}" if fit else "use fewer tokens_per_rank"
        raise ScenarioError("E042", "the recorded file runs out of tokens", why=why, hint=hint, where=path)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open_input(path) as stream, quietly():
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise _bad(path, "the file is a single array", "an .npz file with named arrays is needed")
            with file:
                _require_size(file)
                return {key: file[key] for key in file.files if key in _ARRAYS}
    except UNREADABLE as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ScenarioError("E040", "the recorded file cannot be read", why=why, where=str(path)) from error


def _require_size(file: Any) -> None:
    """OSError for what unpacks to more than can be meant; nothing is unpacked to tell."""
    size = sum(part.file_size for part in file.zip.infolist() if part.filename.removesuffix(".npy") in _ARRAYS)
    if size > _MOST_BYTES:
        raise OSError(f"it unpacks to {size} bytes, {_MOST_BYTES} at most are read")


def _of_ids(path: str | Path, arrays: dict[str, np.ndarray]) -> Recorded:
    ids = arrays["topk_ids"].astype(np.int64)
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise _bad(path, "'topk_ids' are out of range", f"{ids.min()} to {ids.max()}")
    repeated = (np.diff(np.sort(ids, axis=-1), axis=-1) == 0).any(axis=(1, 2))
    if repeated.any():
        raise _bad(path, "a token asks for one expert twice", f"token {int(repeated.argmax())}")
    known, experts = "num_experts" in arrays, int(ids.max()) + 1
    if known:
        given = arrays["num_experts"]
        if given.size != 1 or given.dtype.kind not in "iu" or int(given.item()) < experts:
            raise _bad(
                path, "'num_experts' must be one number above the highest id", f"the highest id is {experts - 1}"
            )
        experts = int(given.item())
    sequence = arrays.get("sequence_id")
    if sequence is not None and (sequence.shape != (len(ids),) or sequence.dtype.kind not in "iu"):
        raise _bad(path, "'sequence_id' must be one integer for each token", f"{sequence.dtype} {list(sequence.shape)}")
    return Recorded(
        ids.astype(np.int32), None, experts, ids.shape[1], ids.shape[2], sequence, known, arrays.get("layer_ids")
    )


def _of_counts(path: str | Path, arrays: dict[str, np.ndarray], idle: bool) -> Recorded:
    counts = arrays["counts"]
    if (counts < 0).any():
        raise _bad(path, "'counts' must not be negative", f"the lowest is {counts.min()}")
    if not idle and (counts.sum(axis=2) == 0).any():
        window, layer = (int(i) for i in np.argwhere(counts.sum(axis=2) == 0)[0])
        raise _bad(path, "a layer without any count gives no workload", f"window {window}, layer {layer}")
    return Recorded(
        None, counts.astype(np.int64), counts.shape[2], counts.shape[1], 0, layer_ids=arrays.get("layer_ids")
    )


def _bad(path: str | Path, what: str, why: str) -> ScenarioError:
    return ScenarioError("E041", what, why=why, where=str(path))
