"""Options of the balancer beyond the reference's configuration file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe_eplb.balancer.replica_choice import ReplicaChoice
from moe_eplb.core.errors import BalancerError

__all__ = ["BalancerOptions"]


@dataclass(frozen=True, slots=True)
class BalancerOptions:
    """How the balancer behaves; the defaults are the reference's.

    Args:
        commit_delay: d: an update taken in iteration i is committed at the layer's iteration i + d.
        decay, window: See `LoadWindow`.
        empty_group: Whether an empty update group follows where the reference adds one.
        preserve_slots: Keep an expert in its slot when it stays on its rank.
        update_timeout_s: The longest that anybody waits for the updater.
        replica_choice: See `ReplicaChoice`.
    """

    commit_delay: int = 1
    decay: float = 0.95
    window: int = 1
    empty_group: Literal["reference", "never"] = "reference"
    preserve_slots: bool = True
    update_timeout_s: float = 5.0
    replica_choice: ReplicaChoice = ReplicaChoice.ROUND_ROBIN

    def __post_init__(self) -> None:
        timeout_is_good = 0.0 < self.update_timeout_s < math.inf
        if self.commit_delay < 1 or self.window < 1 or not 0.0 <= self.decay <= 1.0 or not timeout_is_good:
            raise BalancerError(
                "E148", "the balancer's options are out of range",
                why=f"commit_delay {self.commit_delay}, window {self.window}, decay {self.decay}, "
                f"update_timeout_s {self.update_timeout_s}",
                hint="commit_delay and window are at least 1, decay is in [0, 1], the timeout is positive and finite",
            )  # fmt: skip
