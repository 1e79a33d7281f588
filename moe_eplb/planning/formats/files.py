"""Files of others, read within bounds: no larger than said, no deeper, and nothing in them is ever run."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.input_file import open_input, read_input
from moe_eplb.planning.loads import MOST_TOKENS, bad_content

__all__ = [
    "MOST_BYTES",
    "MOST_NUMBERS",
    "brief",
    "head_of",
    "load_json",
    "load_tensors",
    "require_small",
    "unreadable",
    "whole_numbers",
]

MOST_BYTES = 1 << 30
"""Of one file, and of what a packed one holds."""
MOST_NUMBERS = 1 << 27
"""Of all counts together: a thousand windows of 58 layers of 256 experts are a ninth of it."""
_MOST_JSON = 256 << 20
_MOST_KEYS = 100


def head_of(path: Path) -> bytes:
    """The first bytes of a regular file; E040 if there is none."""
    try:
        with open_input(path) as file:
            return file.read(16)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def load_json(path: Path) -> Any:
    """Plain data of a JSON file: no NaN, not deeper than 1024, at most 100 keys in the outermost object, none twice.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it is no JSON.
    """
    try:
        text = read_input(path, _MOST_JSON)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise bad_content(path, "this is no JSON", str(error)) from error
    if isinstance(data, dict):
        _require_single_keys(path, data, text)
    return data


def _require_single_keys(path: Path, data: dict[str, Any], text: bytes) -> None:
    """E041 for a key of the outermost object that stands twice, of which one would be ignored; or for very many."""
    if len(data) > _MOST_KEYS:
        raise bad_content(path, "this is of no known form", f"{len(data)} keys")
    for key in data:
        quoted = orjson.dumps(key)
        if text.count(quoted) > 1 and len(re.findall(re.escape(quoted) + rb"\s*:", text)) > 1:
            raise bad_content(path, "a key is given twice", f"{key!r:.60}")


def load_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        ScenarioError: E040 it cannot be read or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open_input(path) as file:
            _require_size(file.seek(0, 2))
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118 - no mapping
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:  # the last two: bfloat16
        raise unreadable(path, error) from error


def require_small(archive: zipfile.ZipFile) -> None:
    """OSError for an archive that unpacks to more than `MOST_BYTES`; nothing is unpacked to tell."""
    _require_size(sum(part.file_size for part in archive.infolist()))


def whole_numbers(source: object, name: str, found: NDArray[Any], dimensions: int) -> NDArray[np.int64]:
    """An array as int64.

    Raises:
        ScenarioError: E041 it has another number of dimensions, is empty or too large, or holds something else than
            whole numbers from 0 to `MOST_TOKENS`.
    """
    kind = f"{found.dtype} {list(found.shape)}"
    if found.ndim != dimensions or found.size == 0 or found.dtype.kind not in "iuf":
        raise bad_content(source, f"{name!r} must be numbers in {dimensions} dimensions, none of them empty", kind)
    if found.size > MOST_NUMBERS:
        raise bad_content(source, f"{name!r} is too large", f"{kind}, {MOST_NUMBERS} numbers at most")
    if not np.isfinite(found).all() or (found.dtype.kind == "f" and (found != np.rint(found)).any()):
        raise bad_content(source, f"{name!r} must hold whole numbers", f"some are fractions or no numbers: {kind}")
    low, high = found.min().item(), found.max().item()  # the bound is beyond some dtypes
    if low < 0 or high > MOST_TOKENS:
        why = f"{low} to {high}, allowed are 0 to {MOST_TOKENS}"
        raise bad_content(source, f"{name!r} holds numbers that cannot be, or are negative", why)
    return found.astype(np.int64)


def brief(value: object) -> str:
    """A value in a few characters; of a nested one its kind alone, since its text may have no end."""
    if isinstance(value, int) and abs(value) >= 1 << 64:  # Python refuses to write very long ones
        return "a number of more than 64 bits"
    if value is None or isinstance(value, str | int | float | bool):
        return f"{value!r:.40}"
    return f"a {type(value).__name__}"


def unreadable(path: Path, error: Exception) -> ScenarioError:
    """E040: a file cannot be read."""
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ScenarioError("E040", "the file cannot be read", why=why[:200], where=str(path))


def _require_size(size: int) -> None:
    if size > MOST_BYTES:
        raise OSError(f"it holds {size} bytes, {MOST_BYTES} at most are read")
