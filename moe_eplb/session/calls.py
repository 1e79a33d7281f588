"""A scripted list of API calls against a real balancer, and which of them raised what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from moe_eplb.balancer import AllReduce, MoeLoadBalancer, SingleLayerMoeLoadBalancer
from moe_eplb.core import workload
from moe_eplb.core.errors import BalancerError, EplbError
from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.core.scenario import CallStep, Scenario
from moe_eplb.device import Device
from moe_eplb.session.groups import Groups
from moe_eplb.session.weights import MasterWeights

__all__ = ["run_calls"]


def run_calls(
    scenario: Scenario, balancer: MoeLoadBalancer | None, device: Device, evidence: EvidenceWriter, groups: Groups
) -> None:
    """Make the calls in order until one raises; each leaves a CALL row."""
    if balancer is None:
        raise BalancerError("E159", "scripted calls have no balancer to call", hint="add a balancer section")
    script = _Script(scenario, balancer, groups)
    for index, step in enumerate(scenario.calls or ()):
        error = _attempt(partial(script.call, step))
        evidence.write(Row.CALL, step.layer, balancer.iter_id, index=index, call=step.call, error=error)
        if error is not None:
            break
    device.discard()


def _attempt(call: Callable[[], None]) -> dict[str, str] | None:
    try:
        call()
    except EplbError as error:
        return {"code": error.code, "what": error.what, "text": str(error)}
    return None


class _Script:
    """The balancer of a calls scenario with plain tensors in its slots, and one method for all calls."""

    def __init__(self, scenario: Scenario, balancer: MoeLoadBalancer, groups: Groups) -> None:
        self._scenario, self._balancer = scenario, balancer
        self._allreduce = AllReduce(groups.statistics) if groups.statistics is not None else None
        for layer in range(scenario.model.layers):
            self._add_layer(layer)
        balancer.finalize_model()
        balancer.set_iter_info(enable_statistic=True, enable_update_weights=balancer.is_dynamic_routing())
        model = scenario.model
        tokens = max(1, workload.tokens(scenario, 0, balancer.ep_rank))
        self._where = balancer.device.torch_device
        ids = torch.arange(tokens * model.top_k, dtype=torch.int32, device=self._where) % model.experts
        self._ids = ids.reshape(tokens, model.top_k)

    def call(self, step: CallStep) -> None:
        """Make one call."""
        if step.call in ("start_iter", "end_iter", "abort_iter"):
            getattr(self._balancer, step.call)()
            return
        if step.call == "register_layer":
            self._add_layer(len(self._balancer.layers))
            return
        self._stage(self._balancer.layers[step.layer], step)

    def _stage(self, layer: SingleLayerMoeLoadBalancer, step: CallStep) -> None:
        match step.call:
            case "update_local_statistic" | "update_statistic_with_global_ids":
                getattr(layer, step.call)(self._ids, step.first, step.last)
            case "update_statistic_with_local_ids":
                allreduce = self._allreduce if step.allreduce else None
                layer.update_statistic_with_local_ids(self._ids, step.first, step.last, allreduce)
            case "update_statistic_with_gathered_statistic":
                shape = (self._scenario.ranks, self._scenario.model.experts)
                layer.update_statistic_with_gathered_statistic(torch.ones(shape, dtype=torch.int32, device=self._where))
            case "route":
                layer.route(self._ids, offset_by_ep_rank=True)
            case name:
                getattr(layer, name)()

    def _add_layer(self, index: int) -> None:
        model = self._scenario.model
        layer = self._balancer.add_layer(model.experts, model.top_k, self._scenario.slots_per_rank)
        if not layer.is_dynamic_routing():
            return
        master = MasterWeights.of(self._scenario, index)
        for expert in layer.load_expert_ids:
            for name, tensor in master(expert).items():
                layer.share_expert_weight(expert, name, tensor)
        where, experts = self._balancer.device.torch_device, layer.local_slot_experts()
        # Spare cells hold anything, here the experts once more.
        held = [*experts, *(experts[cell % len(experts)] for cell in range(layer.spare_slots))]
        cells = [{name: tensor.clone().to(where) for name, tensor in master(expert).items()} for expert in held]
        for slot in range(len(experts)):
            for name, tensor in cells[slot].items():
                layer.register_weight_slot(slot, name, tensor)
        layer.register_weight_cells(torch.arange(len(experts), dtype=torch.int32, device=where), cells)
