"""torch's grouped product, under the name that it has in this version."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["grouped_mm"]

grouped_mm = cast(
    "Callable[..., Tensor]", getattr(nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
)
