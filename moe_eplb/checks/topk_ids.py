"""The expert ids of a run, kept as a recorded workload that can be replayed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["TopkIds"]


class TopkIds:
    """Collects one rank's ids by iteration. Of a layer that is repeated, the first forward's."""

    def __init__(self, repeats: Sequence[int]) -> None:
        self._repeats = repeats
        self._iterations: list[np.ndarray] = []

    def append(self, layers: Sequence[Sequence[Tensor]]) -> None:
        """An iteration: for each layer its chunks' ids [T, K], of all its forwards in order."""
        columns = []
        for chunks, repeats in zip(layers, self._repeats, strict=True):
            columns.append(torch.cat(list(chunks[: len(chunks) // repeats])).numpy())
        self._iterations.append(np.stack(columns, axis=1))

    def save(self, path: Path) -> None:
        """Write ``topk_ids`` int32 [tokens, L, K] and ``tokens`` [iterations], the number of each iteration."""
        tokens = [len(ids) for ids in self._iterations]
        np.savez_compressed(path, topk_ids=np.concatenate(self._iterations), tokens=np.asarray(tokens, dtype=np.int64))
