"""The balancer's stage calls as a forward makes them, and their form without a balancer."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from torch import Tensor

from moe_eplb.balancer import AllReduce, ReplicaChoice
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.device import Device

__all__ = ["LayerStages", "UnbalancedStages"]


class LayerStages(Protocol):
    """What `WideEPMoE` calls; `moe_eplb.balancer.SingleLayerMoeLoadBalancer` is one."""

    def begin_forward(self) -> tuple[bool, bool]: ...

    def start_wait_gpu_stage(self) -> None: ...

    def done_wait_gpu_stage(self) -> None: ...

    def update_local_statistic(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None: ...

    def get_local_statistic_tensor(self) -> Tensor | None: ...

    def update_statistic_with_gathered_statistic(self, gathered: Tensor) -> None: ...

    def update_statistic_with_local_ids(
        self, ids: Tensor, is_first_stage: bool, is_last_stage: bool, allreduce: AllReduce | None = None
    ) -> None: ...

    def hold_statistics(self) -> None: ...

    def mark_statistics(self, *, grouped: bool) -> None: ...

    def release_statistics(self) -> None: ...

    def update_statistic_with_global_ids(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None: ...

    def route(self, ids: Tensor, offset_by_ep_rank: bool = False) -> Tensor: ...

    def start_set_cpu_stage(self) -> None: ...

    def done_set_cpu_stage(self) -> None: ...

    def get_agreement_lanes(self) -> Tensor | None: ...

    def update_agreement(self, gathered: Tensor) -> None: ...

    def local_slot_experts(self) -> list[int]: ...

    @property
    def placement(self) -> Placement: ...


class UnbalancedStages:
    """A layer that nobody balances: the placement never changes, stages and statistics have nothing to do."""

    def __init__(self, device: Device, layer: int, placement: Placement, rank: int) -> None:
        self._device = device
        self._layer = layer
        self._rank = rank
        self.placement = placement
        self._tables = RouteTables(placement, rank=rank, choice=ReplicaChoice.ROUND_ROBIN, device=device.torch_device)

    def begin_forward(self) -> tuple[bool, bool]:
        """Nobody counts this layer's forwards: each is first and last."""
        return True, True

    def start_wait_gpu_stage(self) -> None:
        return None

    def done_wait_gpu_stage(self) -> None:
        return None

    def update_local_statistic(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        return None

    def get_local_statistic_tensor(self) -> Tensor | None:
        return None

    def update_statistic_with_gathered_statistic(self, gathered: Tensor) -> None:
        return None

    def update_statistic_with_local_ids(
        self, ids: Tensor, is_first_stage: bool, is_last_stage: bool, allreduce: AllReduce | None = None
    ) -> None:
        return None

    def hold_statistics(self) -> None:
        return None

    def mark_statistics(self, *, grouped: bool) -> None:
        return None

    def release_statistics(self) -> None:
        return None

    def update_statistic_with_global_ids(self, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        return None

    def route(self, ids: Tensor, offset_by_ep_rank: bool = False) -> Tensor:
        """Global slot ids int32 [T, K] for expert ids [T, K]."""
        choose = partial(self._tables.route, ids, offset=self._rank if offset_by_ep_rank else 0)
        return self._device.run(Kind.ROUTE, self._layer, choose)

    def start_set_cpu_stage(self) -> None:
        return None

    def done_set_cpu_stage(self) -> None:
        return None

    def get_agreement_lanes(self) -> Tensor | None:
        return None

    def update_agreement(self, gathered: Tensor) -> None:
        return None

    def local_slot_experts(self) -> list[int]:
        """The expert in each of this rank's slots."""
        return [int(e) for e in self.placement.slot_to_expert[self.placement.rank_slots(self._rank)]]
