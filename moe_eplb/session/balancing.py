"""The balancer of a scenario."""

from __future__ import annotations

import logging

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, ReplicaChoice
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device
from moe_eplb.session.groups import Groups

__all__ = ["layer_placement_slots", "make_balancer"]

_LOG = logging.getLogger(__name__)


def layer_placement_slots(scenario: Scenario, layer: int) -> list[int] | None:
    """The scenario's own initial placement of a layer, if it gives one."""
    given = scenario.balancer.initial_global_assignments if scenario.balancer else None
    return list(given[layer]) if given else None


def make_balancer(scenario: Scenario, rank: int, device: Device, groups: Groups) -> MoeLoadBalancer | None:
    """The balancer of a scenario, or None where it is off for want of one."""
    reason = scenario.balancer_off_reason()
    if reason is not None and rank == 0:
        _LOG.warning("balancer: off, because %s", reason)
    config = scenario.balancer
    static = config is not None and config.layer_updates_per_iter == 0
    if config is None or (reason is not None and not static):
        return None
    options = BalancerOptions(
        commit_delay=config.commit_delay, decay=config.decay, window=config.window, empty_group=config.empty_group,
        preserve_slots=config.preserve_slots, update_timeout_s=config.update_timeout_s,
        replica_choice=ReplicaChoice(scenario.replica_choice), run_ahead=config.run_ahead,
        awake_updater=config.awake_updater, spare_slots=config.spare_slots,
        weights_from=config.weights_from, reduction=config.reduction,
        resident=config.state == "device", policy=config.policy, moves_per_update=config.moves_per_update,
        min_gain=config.min_gain, overlap="before" if scenario.overlap == "before" else "after",
    )  # fmt: skip
    return MoeLoadBalancer(
        rank, scenario.ranks, config.layer_updates_per_iter, device=device, group=groups.setup, options=options
    )
