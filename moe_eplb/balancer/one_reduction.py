"""Layers whose counts and votes are summed over the ranks together, once an iteration, by the last of them.

Each layer counts as ever. Behind the last layer's own counting come the votes on all plans that are due in the next
iteration, one all-reduce of what all layers send, and the folding of all sums; at its hand-over all layers whose turn
it is hand over, so that a load holds the counts of the iteration in which it is taken, as it does where each layer
sums for itself. Layers run in order and each is joined before the next begins, so that what the last one submits comes
after whatever the others have counted.
"""

from __future__ import annotations

from torch import Tensor

from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.balancer.statistics import AllReduce
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import ALL_LAYERS, Kind
from moe_eplb.device import control
from moe_eplb.device.control import LayerStack, LayerState

__all__ = ["OneReductionLayer"]


class OneReductionLayer(ResidentLayer):
    """See the base class and the module.

    Its own part of the messages carries the vote on its own plan, since none of them is sent before all are voted on.
    """

    def require_statistics(self, path: str) -> None:
        """Raise BalancerError E209 unless the path is "local_ids"."""
        if path != "local_ids":
            raise BalancerError(
                "E209", f"layer {self.layer_idx}: statistics {path!r} with one reduction an iteration",
                why="their counts or votes ride in an exchange of each layer, so that nothing is left to be summed at "
                "the end", hint="use statistics 'local_ids', or reduction 'layer'",
            )  # fmt: skip

    def get_agreement_lanes(self) -> Tensor | None:
        """Raises BalancerError E209: votes ride in the one reduction."""
        self.require_statistics("gathered or global_ids")
        return None

    def update_agreement(self, gathered: Tensor) -> None:
        """See `get_agreement_lanes`."""
        self.require_statistics("gathered or global_ids")

    @property
    def _stack(self) -> LayerStack:
        stack = self.resident.stack
        assert stack is not None, "made with the first layer's state"
        return stack

    def _new_state(self) -> LayerState:
        if self.resident.stack is None:
            self.resident.stack = LayerStack.make(
                self.resident.model.layers, self.expert_count, self._owner.options.window, self._device.torch_device,
                self._device.host_visible,
            )  # fmt: skip
        if self.expert_count != self._stack.experts:
            raise BalancerError(
                "E210", f"layer {self.layer_idx} has {self.expert_count} experts, layer 0 has {self._stack.experts}",
                why="one reduction an iteration sums equal rows of all layers", hint="use reduction 'layer'",
            )  # fmt: skip
        return self._stack.add(self._tables.block, self.cells.table)

    # -- work on the balancer stream -------------------------------------------------------------------------------

    def _submit_count(self, kind: Kind, ids: Tensor, is_first_stage: bool, is_last_stage: bool) -> None:
        if kind is not Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS:
            self.require_statistics("gathered" if kind is Kind.UPDATE_LOCAL_STATISTIC else "global_ids")
        super()._submit_count(kind, ids, is_first_stage, is_last_stage)

    def _submit_reduction(self, allreduce: AllReduce | None) -> None:
        if self._is_last:
            super()._submit_reduction(allreduce)

    @property
    def _carries(self) -> int:
        return ALL_LAYERS

    @property
    def _message(self) -> Tensor:
        return self._stack.message

    def _due_of_vote(self, iteration: int) -> int:
        return iteration + 1

    def _vote(self) -> None:
        resident = self.resident
        self._owner.await_plans()
        control.vote_all(resident.model, self._stack, timeout_ns=resident.timeout_ns, wait=resident.wait)

    def _settle_and_fold(self) -> None:
        options = self._owner.options
        control.settle_and_fold_all(self.resident.model, self._stack, ranks=self.ep_size, decay=options.decay)
        for layer in self._owner.layers:
            if isinstance(layer, OneReductionLayer):
                layer._folded()

    def _vote_and_fold(self) -> None:
        self._vote()
        self._settle_and_fold()

    def _hand_over(self) -> None:
        if not self._is_last:
            return
        control.hand_over_all(self.resident.model, self._stack, delay=self._owner.options.commit_delay)
        self._handed_over(range(self._stack.layers))
