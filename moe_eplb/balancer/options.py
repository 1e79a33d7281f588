"""Options of the balancer beyond the reference's configuration file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe_eplb.balancer.replica_choice import ReplicaChoice
from moe_eplb.core.errors import BalancerError
from moe_eplb.planning.online import OnlinePolicy, Planning

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
        resident: Whether the balancer's state lives on the device, so that no forward waits for the host.
        spare_slots: How many slots of a rank a plan changes at most; None for all. With the state on the device each
            takes the memory of one slot.
        run_ahead: How many iterations the host may be ahead of such a device.
        awake_updater: Whether the updater's thread uses a core while it waits for such a device, to hear it sooner.
        weights_from: Where an expert that moves is copied from: "host", the copies that all ranks of the node share, or
            "peer", a slot of this or another rank that holds it, which needs `resident` and no copies on the host.
        policy, moves_per_update, min_gain: See `moe_eplb.planning.online.Planning`.
        overlap: How the balancer's work uses the streams: "after" is `LayerStream`, "before" `OlderChoreography`.
        reduction: Whether each "layer" sums its counts and votes over the ranks, or all layers together once an
            "iteration", which needs `resident`, statistics of local ids and a `commit_delay` of at least 2.
    """

    commit_delay: int = 1
    decay: float = 0.95
    window: int = 1
    empty_group: Literal["reference", "never"] = "reference"
    preserve_slots: bool = True
    update_timeout_s: float = 5.0
    replica_choice: ReplicaChoice = ReplicaChoice.ROUND_ROBIN
    resident: bool = False
    spare_slots: int | None = None
    run_ahead: int = 4
    awake_updater: bool = False
    weights_from: Literal["host", "peer"] = "host"
    policy: OnlinePolicy = "reference"
    moves_per_update: int | None = None
    min_gain: float = 0.0
    overlap: Literal["after", "before"] = "after"
    reduction: Literal["layer", "iteration"] = "layer"

    def planning(self, *, compiled: bool = False) -> Planning:
        """How layers are planned."""
        return Planning(
            self.policy, self.preserve_slots, self.spare_slots, self.moves_per_update, compiled, self.min_gain
        )

    def __post_init__(self) -> None:
        timeout_is_good = 0.0 < self.update_timeout_s < math.inf
        if (
            min(self.commit_delay, self.window, self.run_ahead) < 1
            or not 0.0 <= self.decay <= 1.0
            or not 0.0 <= self.min_gain < math.inf
            or not timeout_is_good
            or self.overlap not in ("after", "before")
            or self.weights_from not in ("host", "peer")
            or self.reduction not in ("layer", "iteration")
        ):
            raise BalancerError(
                "E148", "the balancer's options are out of range",
                why=f"commit_delay {self.commit_delay}, window {self.window}, decay {self.decay}, "
                f"min_gain {self.min_gain}, update_timeout_s {self.update_timeout_s}, run_ahead {self.run_ahead}, "
                f"overlap {self.overlap!r}, weights_from {self.weights_from!r}, reduction {self.reduction!r}",
                hint="delay, window and run_ahead are at least 1, decay lies in [0, 1], min_gain is finite and >= 0, "
                "the timeout is finite and > 0, overlap is 'after' or 'before', weights_from 'host' or 'peer', "
                "reduction 'layer' or 'iteration'",
            )  # fmt: skip
        if self.weights_from == "peer" and not self.resident:
            raise BalancerError(
                "E207", "weights cannot come from peers while the balancer's state lives on the host",
                why="a slot that another rank reads would be overwritten in place", hint="use resident=True",
            )  # fmt: skip
        if self.reduction == "iteration":
            self._require_one_reduction()

    def _require_one_reduction(self) -> None:
        for holds, why, hint in (
            (self.resident, "the state on the host sums and votes layer by layer", "use resident=True"),
            (
                self.commit_delay >= 2,
                f"commit_delay {self.commit_delay}: a plan that is handed over at the end of an iteration is voted on "
                "at the end of the next one, and due in the one after that",
                "use commit_delay=2 or more",
            ),
            (self.overlap == "after", f"overlap {self.overlap!r} has no sum of its own", "use overlap='after'"),
        ):
            if not holds:
                what = "one reduction an iteration does not fit the other options"
                raise BalancerError("E208", what, why=why, hint=hint)
