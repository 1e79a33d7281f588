"""Writes ``recorded_small.npz``, byte for byte the same everywhere: integers only, and an archive without times.

24 made-up sequences of different lengths; each prefers its own experts, as texts on one topic do.
Run as ``python scenarios/data/make_recorded_small.py [PATH]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

LAYERS, EXPERTS, TOP_K, SEQUENCES, SEED = 4, 64, 4, 24, 20240607


def make(path: Path) -> None:
    """Write topk_ids uint8 [tokens, layers, K], sequence_id int32 [tokens] and num_experts."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(48, 81, SEQUENCES)
    weight = rng.integers(1, 9, (SEQUENCES, LAYERS, EXPERTS))
    sequence = np.repeat(np.arange(SEQUENCES), lengths)
    score = rng.integers(1, 1 << 20, (len(sequence), LAYERS, EXPERTS)) * weight[sequence]
    ids = np.argsort(-score, axis=-1, kind="stable")[..., :TOP_K]
    np.savez(path, topk_ids=ids.astype(np.uint8), sequence_id=sequence.astype(np.int32), num_experts=np.int64(EXPERTS))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("recorded_small.npz"))
