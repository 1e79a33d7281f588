"""What a model asks of a layer's balancer while it is built: which expert goes where, and whose weights are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_eplb.balancer.layer_update import LayerUpdate
from moe_eplb.balancer.replica_choice import RouteTables
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement

if TYPE_CHECKING:
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer

__all__ = ["LayerWeights"]


class LayerWeights:
    """Placement, route tables and weights of one layer; `SingleLayerMoeLoadBalancer` adds the stage calls.

    Args:
        owner: The model's balancer.
        layer_idx: Position among the balancer's layers, in order of registration.
        expert_count: E.
        top_k: K.
        placement: The initial placement of E experts in P slots.
    """

    def __init__(
        self, owner: MoeLoadBalancer, layer_idx: int, expert_count: int, top_k: int, placement: Placement
    ) -> None:
        self._owner = owner
        self.layer_idx, self.expert_count, self.top_k = layer_idx, expert_count, top_k
        self.ep_rank, self.ep_size = owner.ep_rank, owner.ep_size
        self.slot_count_per_rank = placement.slots_per_rank
        self.updates_enabled = owner.is_dynamic_routing()
        self.updates = LayerUpdate(owner, layer_idx, placement)
        self._tables = RouteTables(
            placement, rank=self.ep_rank, choice=owner.options.replica_choice, device=owner.device.torch_device
        )

    def finish_weights(self) -> None:
        """All weights have been given: share the host copies, and check what was registered. Collective."""
        host = self.updates.host if self.need_load_shared_weights() else None
        if host is not None:
            host.finalize()
        self.updates.slots.check(host)

    def is_static_routing(self) -> bool:
        """Whether the placement never changes."""
        return not self.updates_enabled

    def is_dynamic_routing(self) -> bool:
        """Whether experts may move while the model runs."""
        return self.updates_enabled

    def need_load_shared_weights(self) -> bool:
        """Whether the model must give the host copies of `load_expert_ids`: experts move, and do so from there."""
        return self.updates_enabled and self._owner.options.weights_from == "host"

    @property
    def spare_slots(self) -> int:
        """How many more experts than slots this rank needs memory for, see `register_weight_cells`."""
        return 0

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        return self.updates.placement

    @property
    def load_expert_ids(self) -> range:
        """Experts whose host copy this rank gives; none where no copies are needed."""
        return self.updates.host.experts_of(self.ep_rank) if self.need_load_shared_weights() else range(0)

    def local_slot_experts(self) -> list[int]:
        """The expert in each of this rank's slots."""
        return [int(e) for e in self.placement.slot_to_expert[self.placement.rank_slots(self.ep_rank)]]

    def set_initial_weight_assignments(self, experts: list[int]) -> None:
        """Set the expert of each of the P slots, before weights are loaded."""
        placement = Placement(self.ep_size, self.expert_count, torch.tensor(experts, dtype=torch.int32).numpy())
        if placement.slots_per_rank != self.slot_count_per_rank:
            raise BalancerError(
                "E131", f"layer {self.layer_idx}: the initial placement has {placement.slots} slots",
                why=f"the layer has {self.slot_count_per_rank} on each of {self.ep_size} ranks",
                hint="give the expert of every slot of every rank",
            )  # fmt: skip
        self.updates.placement = placement
        self._tables.set(placement)

    def register_weight_slot(self, local_slot: int, name: str, tensor: Tensor) -> None:
        """Tell which tensor the kernel reads as weight `name` of a local slot."""
        self.updates.slots.register(local_slot, name, tensor)

    def register_weight_cells(self, table: Tensor, cells: Sequence[Mapping[str, Tensor]]) -> None:
        """Tell the cells of this rank: their tensors, and the int32 [S] on the device that says which are live.

        Needed only where the balancer's state lives on the device.
        """
        return None

    def expect_expert_weights(self, weights: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Tell dtype and shape of each weight before the first is shared, so that none is kept twice meanwhile."""
        self.updates.host.expect(weights)

    def share_expert_weight(self, expert: int, name: str, tensor: Tensor) -> None:
        """Give the host copy of one weight of one expert of `load_expert_ids`; BalancerError E164 for any other."""
        if not self.need_load_shared_weights():
            raise BalancerError(
                "E164", f"layer {self.layer_idx}: expert {expert} is not shared by rank {self.ep_rank}",
                why="no host copies are needed", hint="share only load_expert_ids",
            )  # fmt: skip
        self.updates.host.share_host_tensor(expert, name, tensor)
