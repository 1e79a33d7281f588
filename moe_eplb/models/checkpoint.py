"""Weights of a model's MoE blocks from a Hugging Face checkpoint, read tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.core.errors import ScenarioError
from moe_eplb.models.families import FAMILIES
from moe_eplb.models.shards import has_weights, missing, open_shard, read_index
from moe_eplb.models.weights import SeededWeights, Weights

__all__ = ["CheckpointWeights", "open_weights"]

_DTYPES = ("F32", "BF16", "F16")


def open_weights(folder: Path, architecture: Architecture, *, seed: int, dtype: torch.dtype) -> Weights:
    """The weights of a folder; if it has a configuration alone, they are drawn from `seed` in `dtype`.

    Raises:
        ScenarioError: See `CheckpointWeights`.
    """
    if has_weights(folder):
        return CheckpointWeights(folder, architecture)
    return SeededWeights(architecture, seed, dtype)


class CheckpointWeights:
    """`Weights` from safetensors, in the checkpoint's dtype.

    Nothing is kept: a file is mapped while one expert is read from it, and what is given is a copy of its own.

    Args:
        folder: Where ``model.safetensors``, or its index and shards, are.
        architecture: What its config.json says.

    Attributes:
        bytes_read: How much has been read of each tensor, by name.

    Raises:
        ScenarioError: E046 when there are no weights or the index is damaged; from the methods E047 for a tensor that
            is missing, E048 for one of another shape or dtype than the configuration says, E049 for a file that
            cannot be read.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self._folder, self._architecture = folder, architecture
        self._names = FAMILIES[architecture.family].tensors
        self._files = read_index(folder)
        self.bytes_read: Counter[str] = Counter()

    def router(self, layer: int) -> Tensor:
        """See `Weights`."""
        sizes = self._architecture
        name = self._block(layer) + self._names.router
        return self._read({name: (sizes.experts, sizes.hidden)})[name]

    def router_bias(self, layer: int) -> Tensor | None:
        """See `Weights`."""
        if self._names.router_bias is None:
            return None
        name = self._block(layer) + self._names.router_bias
        return self._read({name: (self._architecture.experts,)})[name]

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """See `Weights`."""
        prefix = self._block(layer) + self._names.expert.format(expert=expert)
        return self._feed_forward(prefix, self._architecture.intermediate)

    def shared(self, layer: int) -> dict[str, Tensor] | None:
        """See `Weights`."""
        sizes = self._architecture
        if self._names.shared is None or not sizes.shared_intermediate:
            return None
        weights = self._feed_forward(self._block(layer) + self._names.shared, sizes.shared_intermediate)
        if self._names.shared_gate is not None:
            name = self._block(layer) + self._names.shared_gate
            weights["gate"] = self._read({name: (1, sizes.hidden)})[name]
        return weights

    def _block(self, layer: int) -> str:
        return self._names.block.format(layer=layer)

    def _feed_forward(self, prefix: str, intermediate: int) -> dict[str, Tensor]:
        hidden, names = self._architecture.hidden, self._names.matrices
        w1, w2, w3 = (prefix + name for name in (names.w1, names.w2, names.w3))
        rows = {w3: (intermediate, hidden), w1: (intermediate, hidden)}
        found = self._read({**rows, w2: (hidden, intermediate)}, joined=(w3, w1))
        return {"w3_w1": found[w3], "w2": found[w2]}

    def _read(self, shapes: Mapping[str, tuple[int, ...]], joined: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Copies of tensors by name; those `joined` become one, under the first one's name, without a copy between."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            mapped: dict[str, Tensor] = {}
            for name, shape in shapes.items():
                path = self._file_of(name)
                if path not in opened:
                    opened[path] = stack.enter_context(open_shard(path))
                mapped[name] = self._mapped(opened[path], path, name, shape)
            found = {name: tensor.clone() for name, tensor in mapped.items() if name not in joined}
            if joined:
                found[joined[0]] = torch.cat([mapped[name] for name in joined])
            return found

    def _file_of(self, name: str) -> Path:
        if name not in self._files:
            raise missing(name, self._files, self._folder)
        return self._files[name]

    def _mapped(self, shard: Any, path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in shard.keys():  # noqa: SIM118 - a shard has keys but is no mapping
            raise missing(name, shard.keys(), path)
        found = shard.get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in _DTYPES:
            raise ScenarioError(
                "E048", f"tensor {name!r} is not what the configuration says", where=str(path),
                why=f"{found.get_dtype()} {list(found.get_shape())}, wanted: {list(shape)} of {', '.join(_DTYPES)}",
                hint="check that config.json belongs to these weights",
            )  # fmt: skip
        tensor: Tensor = shard.get_tensor(name)
        self.bytes_read[name] += tensor.nbytes
        return tensor
