"""How fast weights move and are read, which is what a plan's price goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moe_eplb.core.errors import UsageError

__all__ = ["WAYS", "Links"]

WAYS = ("same_rank", "same_node", "cross_node", "host")
"""Where the expert of a slot may come from, nearest first."""
_MEASURED = (*WAYS, "memory")


@dataclass(frozen=True, slots=True)
class Links:
    """How fast weights move and are read, in GB/s, how large a slot is, and what a routed token costs on its rank.

    Raises:
        UsageError: E193 a speed or the size is not above 0, or the cost is below it.
    """

    slot_bytes: int = 44_040_192
    same_rank_gb_s: float = 1500.0
    same_node_gb_s: float = 150.0
    cross_node_gb_s: float = 25.0
    host_gb_s: float = 50.0
    us_per_token: float = 0.05
    memory_gb_s: float = 3350.0

    def __post_init__(self) -> None:
        for name in _MEASURED:
            if not (math.isfinite(self.speed(name)) and self.speed(name) > 0):
                raise _refused(f"{name} cannot have such a speed", f"{self.speed(name):g} GB/s")
        if self.slot_bytes < 1:
            raise _refused("a slot cannot have such a size", f"{self.slot_bytes} bytes")
        if not (math.isfinite(self.us_per_token) and self.us_per_token >= 0):
            raise _refused("a token cannot cost that", f"{self.us_per_token:g} us")

    def speed(self, way: str) -> float:
        """GB/s of ``same_rank``, ``same_node``, ``cross_node``, ``host`` or ``memory``."""
        speed: float = getattr(self, f"{way}_gb_s")
        return speed

    def with_speeds(self, text: str) -> Links:
        """The same with other speeds in GB/s, such as ``same_node=150,cross_node=25``.

        Raises:
            UsageError: E193 it is not of that form, names no link or one twice, or a speed is not above 0.
        """
        speeds: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in _MEASURED or name in speeds:
                what = f"{name[:40]!r} is given twice" if name in speeds else f"{name[:40]!r} is no link"
                raise _refused(what, f"in {text[:80]!r}")
            try:
                speeds[name] = float(value)
            except ValueError:
                raise _refused(f"{value[:40]!r} is no speed of {name} in GB/s", f"in {text[:80]!r}") from None
        return replace(self, **{f"{name}_gb_s": speed for name, speed in speeds.items()})


def _refused(what: str, why: str) -> UsageError:
    return UsageError("E193", what, why=why, hint=f"such as same_node=150,cross_node=25; of {', '.join(_MEASURED)}")
