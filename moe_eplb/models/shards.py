"""Which file of a Hugging Face checkpoint holds which tensor, and reading one from it.

Only safetensors are read, never pickles: a file that can run code when it is loaded has no place in a checkpoint that
somebody else made.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_eplb.core.errors import ScenarioError

__all__ = ["has_weights", "missing", "open_shard", "read_index"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "consolidated*.pt", "*.pth")
_COMPARED = 1000
"""Comparing names is slow, and a large checkpoint has tens of thousands."""
_HINT = "write the checkpoint again with save_pretrained, or download it again"


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights of any format, readable or not."""
    return any(True for pattern in (*_SAFETENSORS, *_PICKLES) for _ in folder.glob(pattern))


def read_index(folder: Path) -> dict[str, Path]:
    """The file of every tensor by the tensor's name; a single file goes before an index, as in transformers.

    Raises:
        ScenarioError: E046 when there are no weights, or the index is damaged or names files that are not there.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        with open_shard(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    if not index.is_file():
        raise _no_weights(folder)
    shards = {name: folder / _plain(shard, index) for name, shard in _weight_map(index).items()}
    if absent := sorted({shard.name for shard in shards.values() if not shard.is_file()}):
        raise ScenarioError(
            "E046", "files of the checkpoint are not there", why=f"{', '.join(absent[:4])} ({len(absent)} in all)",
            hint=_HINT, where=str(index),
        )  # fmt: skip
    return shards


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped for the length of the block: what is read becomes pages of this process.

    Raises:
        ScenarioError: E049 when it cannot be opened or read, or is truncated.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ScenarioError(
            "E049", "a file of the checkpoint cannot be read", why=f"{error}, {_size(path)}", hint=_HINT,
            where=str(path),
        ) from error  # fmt: skip


def missing(name: str, among: Iterable[str], where: Path) -> ScenarioError:
    """E047, with the name that exists and is most alike."""
    nearest = _nearest(name, among)
    return ScenarioError(
        "E047", f"the checkpoint has no tensor {name!r}",
        why=f"the nearest name there is {nearest!r}" if nearest else "there is no tensor at all",
        hint="check that config.json belongs to these weights", where=str(where),
    )  # fmt: skip


def _nearest(name: str, among: Iterable[str]) -> str | None:
    """The most similar of the names that share most of their path: a neighbour, not its like in another layer."""
    by_prefix: dict[int, list[str]] = {}
    for other in among:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), other.split("."), strict=False))
        by_prefix.setdefault(sum(1 for _ in alike), []).append(other)
    if not by_prefix:
        return None
    return difflib.get_close_matches(name, by_prefix[max(by_prefix)][:_COMPARED], n=1, cutoff=0.0)[0]


def _no_weights(folder: Path) -> ScenarioError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return ScenarioError(
            "E046", "the checkpoint has no safetensors", where=str(folder),
            why=f"{pickles[0]} is a pickle, which is refused because loading it may run any code",
            hint="convert it where you trust it: save_pretrained writes safetensors",
        )  # fmt: skip
    return ScenarioError(
        "E046", "the checkpoint has no weights", why=f"neither {_SINGLE} nor {_INDEX} is there",
        hint="name the folder that save_pretrained wrote", where=str(folder),
    )  # fmt: skip


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        why = "it has no 'weight_map'" if isinstance(error, KeyError | TypeError) else str(error)
        raise ScenarioError("E046", "the checkpoint's index is damaged", why=why, hint=_HINT, where=str(index)) \
            from error  # fmt: skip
    if not isinstance(found, dict) or not found:
        raise ScenarioError(
            "E046", "the checkpoint's index is damaged", why="its 'weight_map' names no tensor", hint=_HINT,
            where=str(index),
        )  # fmt: skip
    return found


def _plain(shard: Any, index: Path) -> str:
    """The name of a shard, which must lie beside its index."""
    if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard or "\0" in shard:
        raise ScenarioError(
            "E046", "the checkpoint's index names a file outside its folder", why=f"{shard!r} is no plain file name",
            hint="do not use this checkpoint", where=str(index),
        )  # fmt: skip
    return shard


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.exists() else "the file is gone"
