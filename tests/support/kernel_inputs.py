"""What kernels are given in tests, on the GPU where there is one."""

from __future__ import annotations

import torch

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def skewed_ids(entries: int, experts: int, seed: int = 0, top_k: int = 2) -> torch.Tensor:
    """Skewed ids [T, K], some of them outside [0, E) on either side."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(entries, top_k, generator=generator) ** 2 * (experts + 2)).int() - 1
    return ids.to(_DEVICE)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that are drawn from a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(_DEVICE)
