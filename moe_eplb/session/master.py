"""What a layer's results are proved against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Master"]


class Master(NamedTuple):
    """The weights of a layer's experts by logical expert, and its shared expert's."""

    experts: Callable[[int], Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] | None
