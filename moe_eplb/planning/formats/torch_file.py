"""Files of ``torch.save``: a zip archive with a pickle in it, of which only tensors and plain data are ever made."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core import recorded
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.input_file import open_input, read_input
from moe_eplb.planning.formats.files import MOST_BYTES, MOST_NUMBERS, require_small, unreadable
from moe_eplb.planning.loads import bad_content

__all__ = ["array_of", "is_torch_file", "load_torch", "save_torch"]

_ALLOWED = re.compile(
    r"collections OrderedDict|torch Size|torch\._utils _rebuild_tensor_v2"
    r"|torch (?:Untyped|Byte|Char|Short|Int|Long|Half|BFloat16|Float|Double|Bool)Storage"
)
"""What a pickle may name. Torch has a list of its own, which also holds what could ask for any amount of memory."""
_BY_NAME = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")


def is_torch_file(path: Path) -> bool:
    """Whether a zip archive is one of ``torch.save``; E040 if it is damaged."""
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except recorded.UNREADABLE as error:
        raise unreadable(path, error) from error


def load_torch(path: Path) -> Any:
    """The content of a file: dictionaries, lists, numbers, text and tensors. Nothing in it is run.

    Raises:
        ScenarioError: E040 it cannot be read, is damaged or too large. E197 it holds anything else.
    """
    try:
        data = read_input(path, MOST_BYTES)
        if data[:1] == b"\x80":
            raise _hostile(path, "a bare pickle, as old versions of torch wrote them")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check(path, archive)
    except recorded.UNREADABLE as error:
        raise unreadable(path, error) from error
    import torch

    try:
        # Recordings keep tensors of the GPUs that they were made on.
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle may raise anything, and torch's advice is to run what is in it
        raise bad_content(path, "the file is damaged", f"{type(error).__name__} in torch.load") from error


def array_of(path: Path, name: str, found: Any) -> NDArray[Any]:
    """A tensor of a file as an array.

    Raises:
        ScenarioError: E041 it is no plain tensor of numbers, or claims to be larger than any recording.
    """
    import torch

    plain = type(found) is torch.Tensor and found.layout == torch.strided and found.device.type == "cpu"
    if not plain or found.is_quantized or found.dtype == torch.bfloat16 or found.is_complex():
        raise bad_content(path, f"{name!r} must be a tensor of numbers", type(found).__name__)
    if found.numel() > MOST_NUMBERS:  # a view repeats one number as often as it says
        raise bad_content(path, f"{name!r} is too large", f"{list(found.shape)}, {MOST_NUMBERS} numbers at most")
    made: NDArray[Any] = found.detach().numpy()
    return made


def save_torch(data: Any) -> bytes:
    """The bytes that ``torch.save`` would write of plain data and arrays."""
    import torch

    made = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in data.items()}
    buffer = io.BytesIO()
    torch.save(made, buffer)
    return buffer.getvalue()


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    """That the archive is small once unpacked, and that its one pickle names nothing but tensors."""
    require_small(archive)
    pickles = [part for part in archive.infolist() if part.filename.endswith(".pkl")]
    if len(pickles) != 1:
        raise OSError(f"it holds {len(pickles)} pickles, not one")
    for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
        if operation.name in _BY_NAME and not _ALLOWED.fullmatch(str(argument)):
            named = str(argument).replace(" ", ".") if operation.name in ("GLOBAL", "INST") else operation.name
            raise _hostile(path, f"its pickle asks for {named!r:.80}")


def _hostile(path: Path, why: str) -> ScenarioError:
    return ScenarioError(
        "E197", "the file may hold more than tensors, numbers and text", where=str(path),
        why=f"{why}; nothing of it was run",
        hint="such a file can run any program when it is opened: write it anew where you trust it",
    )  # fmt: skip
