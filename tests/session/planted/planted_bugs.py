"""Bugs to plant, each at the seam where it would really happen: name -> (module, function that spoils the module)."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _rank() -> int:
    """This process's rank, or -1 in the parent."""
    name = multiprocessing.current_process().name
    return int(name.removeprefix("rank")) if name.startswith("rank") else -1


def stale_weight(module: ModuleType) -> None:
    """Rank 1 forgets the last tensor of what a commit writes."""
    write = module.SlotWeights.write

    def forgetful(self: Any, staged: Any) -> None:
        kept = staged.tensors[:-1] if _rank() == 1 else staged.tensors
        write(self, dataclasses.replace(staged, tensors=kept))

    module.SlotWeights.write = forgetful


def slot_table_off_by_one(module: ModuleType) -> None:
    """Every rank's table names the slot after the right one."""
    tables = module.RouteTables._tables

    def shifted(self: Any, placement: Any) -> Any:
        counts, starts, slots = tables(self, placement)
        return counts, starts, (slots + 1) % placement.slots

    module.RouteTables._tables = shifted


def late_commit(module: ModuleType) -> None:
    """Rank 1 commits each plan one iteration after the others."""
    commit_due = module.LayerUpdate.commit_due

    def late(self: Any, iteration: int) -> bool:
        if _rank() == 1 and self.pending is not None and self.pending.due == iteration:
            self.pending.due += 1
            return False
        return bool(commit_due(self, iteration))

    module.LayerUpdate.commit_due = late


def replica_chosen_by_receiver(module: ModuleType) -> None:
    """Each receiving rank chooses the replica by its own rank, so that ranks disagree and a token is summed twice."""
    import torch

    dispatch = module.WideEPMoE._dispatch

    def rechoose(self: Any, exchange: Any, x: Any, scales: Any, chunk: Any) -> Any:
        received = dispatch(self, exchange, x, scales, chunk)
        layer = self.layer_load_balancer
        local = layer._tables.route(received.expert_ids, offset=layer.ep_rank) - self.rank * self.slots_per_rank
        mine = torch.where((local >= 0) & (local < self.slots_per_rank), local, -1)
        slots, taken = torch.full_like(received.slots, -1), 0
        for block, count in zip(slots.chunk(len(exchange._counts)), exchange._counts, strict=True):
            block[:count] = mine[taken : taken + count]
            taken += count
        return dataclasses.replace(received, slots=slots, first_slot=0, entries=int((slots >= 0).sum()))

    module.WideEPMoE._dispatch = rechoose


def statistics_never_reduced(module: ModuleType) -> None:
    """The sum over ranks leaves the counts as they were; only the vote that rides with them is summed."""
    reduce = module.AllReduce.__call__

    def local_only(self: Any, tensor: Any) -> None:
        mine = tensor.clone()
        reduce(self, tensor)
        tensor[:-5] = mine[:-5]

    module.AllReduce.__call__ = local_only


def missing_stream_join(module: ModuleType) -> None:
    """done_wait_gpu_stage does not make the main stream wait."""

    def no_join(self: Any, *, joined: bool = False) -> None:
        self._readers = [self._device.current]

    module.LayerStream.begin_reading = no_join


def one_layer_left_out_of_the_sum(module: ModuleType) -> None:
    """The one sum over ranks leaves the counts of the second layer as they were; its votes are summed."""
    reduce = module.AllReduce.__call__

    def without_one(self: Any, tensor: Any) -> None:
        mine = tensor[1, :-5].clone()
        reduce(self, tensor)
        tensor[1, :-5] = mine

    module.AllReduce.__call__ = without_one


def loads_from_before_the_sum(module: ModuleType) -> None:
    """The last layer hands loads over that lack the counts of the iteration."""
    fold, hand_over = module.settle_and_fold_all, module.hand_over_all
    before: list[Any] = []

    def kept(model: Any, stack: Any, **options: Any) -> None:
        before[:] = [stack.load.clone()]
        fold(model, stack, **options)

    def stale(model: Any, stack: Any, *, delay: int) -> None:
        hand_over(model, stack, delay=delay)
        stack.handed_load[stack.handed == model.turn[0]] = before[0][stack.handed == model.turn[0]]

    module.settle_and_fold_all, module.hand_over_all = kept, stale


def wrong_axis_balancedness(module: ModuleType) -> None:
    """Mean over maximum along another axis than the ranks'."""

    def wrong(rank_load: Any) -> Any:
        import numpy as np

        columns = np.asarray(rank_load)[..., None]
        return (columns.mean(-1) / np.maximum(columns.max(-1), 1)).mean()

    module.balancedness = wrong


def updates_silently_off(module: ModuleType) -> None:
    """No layer ever hands its load over."""
    module.MoeLoadBalancer.takes_update = lambda self, layer: False


def digest_disagreement(module: ModuleType) -> None:
    """Rank 1 plans from another load than the others."""
    plan = module.plan

    def other(load: Any, current: Any, **options: Any) -> Any:
        return plan(load[::-1].copy() if _rank() == 1 else load, current, **options)

    module.plan = other


def load_never_zeroed(module: ModuleType) -> None:
    """Every rank's next plan is made from the load of the plan before, too."""

    def kept(self: Any) -> Any:
        return self._load.numpy().astype("float64")

    module.LoadWindow.take = kept


def other_experts_than_asked(module: ModuleType) -> None:
    """Every rank's router returns the experts after the supplied ones."""
    apply = module.SuppliedMoeRoutingMethod.apply

    def after(self: Any, logits: Any) -> Any:
        ids, scales = apply(self, logits)
        return (ids + 1) % logits.shape[1], scales

    module.SuppliedMoeRoutingMethod.apply = after


def scales_in_other_order(module: ModuleType) -> None:
    """The routing method hands out its scales in the wrong order."""
    apply = module.SuppliedMoeRoutingMethod.apply

    def swapped(self: Any, logits: Any) -> Any:
        ids, scales = apply(self, logits)
        return ids, scales.flip(1)

    module.SuppliedMoeRoutingMethod.apply = swapped


def second_best_expert(module: ModuleType) -> None:
    """The router leaves out every token's best expert."""
    apply = module.RenormalizeMoeRoutingMethod.apply

    def without_best(self: Any, logits: Any) -> Any:
        best = logits.argmax(dim=1, keepdim=True)
        return apply(self, logits.scatter(1, best, float("-inf")))

    module.RenormalizeMoeRoutingMethod.apply = without_best


def leaked_segment(module: ModuleType) -> None:
    """Closing a host copy forgets to remove its segment."""
    module.HostMoeTensorSharer.close = lambda self: self._views.clear()


def chunk_reads_without_waiting(module: ModuleType) -> None:
    """A chunk on another stream than the first one's routes before the wait for the layer is joined."""

    def no_join(self: Any) -> None:
        if self._device.current not in self._readers:
            self._readers.append(self._device.current)

    module.LayerStream.read = no_join


def hand_over_while_a_chunk_reads(module: ModuleType) -> None:
    """The hand-over waits for the last chunk's stream alone."""
    module.LayerStream.end_reading = lambda self: self._follow(self._device.current)


def chunk_result_used_early(module: ModuleType) -> None:
    """Nobody waits for the chunks on the other stream at the end."""
    each = module.ChunkStreams.each

    def no_end(self: Any, chunks: Any, forward: Any) -> None:
        end, self._end = self._end, self._device.new_event()
        self._device.record(self._end, self._device.current)
        record = self._device.record
        self._device.record = lambda event, stream: None if event is self._end else record(event, stream)
        try:
            each(self, chunks, forward)
        finally:
            self._device.record = record
            self._end = end

    module.ChunkStreams.each = no_end


def empty_chunk_counted_again(module: ModuleType) -> None:
    """An empty chunk counts the ids of the chunk before once more."""
    after_top_k = module.GatheredPath.after_top_k

    def again(self: Any, ids: Any, chunk: Any) -> None:
        before = getattr(self, "before", ids)
        self.before = ids
        after_top_k(self, ids if len(ids) else before, chunk)

    module.GatheredPath.after_top_k = again


def padding_counted(module: ModuleType) -> None:
    """The rows that fill up a short rank's block are counted as tokens of expert 0."""
    import torch

    def all_rows(self: Any, ids: Any) -> Any:
        return torch.where(ids < 0, 0, ids)

    module.AllGatherExchange._real_rows = all_rows


def shared_expert_of_other_tokens(module: ModuleType) -> None:
    """The shared expert's rows come back in another order."""
    forward = module.SharedExpert.forward
    module.SharedExpert.forward = lambda self, x: forward(self, x).flip(0)


def shared_expert_not_added(module: ModuleType) -> None:
    """The shared expert computes, and nothing of it comes into the block's output."""
    start = module.SharedStream.start

    def lose(self: Any, work: Any, x: Any) -> Any:
        join = start(self, work, x)
        return lambda: join() * 0

    module.SharedStream.start = lose


def tables_without_cells(module: ModuleType) -> None:
    """On rank 1 a commit on the device changes the tables, but not the cells that the slots live in."""
    take_over = module.take_over

    def half(model: Any, layer: Any) -> None:
        cells = layer.cells.clone()
        take_over(model, layer)
        if _rank() == 1:
            layer.cells.copy_(cells)

    module.take_over = half


def scales_stay_behind(module: ModuleType) -> None:
    """On every rank a commit writes the matrices of the experts that come, and not the scales of their rows."""
    write = module.SlotWeights.write

    def without_scales(self: Any, staged: Any) -> None:
        matrices = [one for one in staged.tensors if not one[1].endswith("_scale")]
        write(self, dataclasses.replace(staged, tensors=matrices))

    module.SlotWeights.write = without_scales


def scales_stay_behind_in_cells(module: ModuleType) -> None:
    """The same where experts are written into free cells: the scales of what was there before are left in them."""
    write = module.CellWeights.write

    def without_scales(self: Any, slot: int, cell: int, source: Any, staged: Any) -> Any:
        scales = [tensor for name, tensor in self.cells[cell].items() if name.endswith("_scale")]
        copies = write(self, slot, cell, source, staged)
        return [(target, source) for target, source in copies if not any(target is scale for scale in scales)]

    module.CellWeights.write = without_scales


def peer_reads_the_first_cells(module: ModuleType) -> None:
    """Rank 1 takes other ranks' slots to live where they lived at first."""
    of = module.FromPeers.of

    def stale(self: Any, live: Any, experts: Any) -> Any:
        if _rank() == 1:
            first = live.cells.copy()
            first[:] = range(first.shape[1])
            live = dataclasses.replace(live, cells=first)
        return of(self, live, experts)

    module.FromPeers.of = stale


def peers_asked_for_and_the_host_taken(module: ModuleType) -> None:
    """Weights come from the host although they were to come from peers."""

    def from_host(self: Any, cells: Any) -> Any:
        return [module.FromHost(layer.updates.host, self.ep_rank) for layer in self.layers]

    module.ResidentCalls._weight_sources = from_host


def every_vote_counts_as_yes(module: ModuleType) -> None:
    """The device commits whatever it holds, while rank 1 plans from another load than the others."""
    settle = module.settle

    def yes(model: Any, following: Any, lanes: Any, *, ranks: int) -> None:
        settle(model, following, lanes, ranks=ranks)
        model.decision[following.layer] = 1

    hand_over = module.hand_over

    def other_load(model: Any, layer: Any, *, delay: int) -> None:
        hand_over(model, layer, delay=delay)
        if _rank() == 1 and int(layer.handed) == int(model.turn[0]):
            layer.handed_load.copy_(layer.handed_load.flip(0))

    module.settle, module.hand_over = yes, other_load


def device_keeps_its_load(module: ModuleType) -> None:
    """The device hands its load over and goes on from it."""
    hand_over = module.hand_over

    def keeping(model: Any, layer: Any, *, delay: int) -> None:
        load = layer.load.clone()
        hand_over(model, layer, delay=delay)
        layer.load.copy_(load)

    module.hand_over = keeping


def older_wait_not_joined(module: ModuleType) -> None:
    """done_wait_gpu_stage of the older choreography does not make the main stream wait."""

    def no_join(self: Any) -> None:
        self._taken = self._done
        self._readers = [self._device.current]

    module.OlderChoreography.begin_reading = no_join


def older_statistics_not_joined(module: ModuleType) -> None:
    """The older choreography hands a layer over while its statistics stream still counts."""
    module.OlderChoreography._join_statistics = lambda self, hand_over: None


def unfollowed(route: Callable[..., Any]) -> Callable[..., Any]:
    """A `ResidentLayer._route` whose kernel the balancer stream does not wait for."""

    def alone(layer: Any, *arguments: Any) -> Any:
        layer._stream.follow = lambda: None
        slots = route(layer, *arguments)
        del layer._stream.follow
        return slots

    return alone


def vote_without_the_route_that_counts(module: ModuleType) -> None:
    """The balancer stream does not wait for the kernel that routes and counts, where statistics are not held."""
    module.ResidentLayer.hold_statistics = lambda self: None
    module.ResidentLayer._route = unfollowed(module.ResidentLayer._route)


def held_vote_without_the_route_that_counts(module: ModuleType) -> None:
    """Held statistics do not wait for the mark."""
    module.LayerStream.follow_mark = lambda self: None


def moves_that_do_not_pay(module: ModuleType) -> None:
    """Slots follow each load, however little that brings."""
    planning = module.BalancerOptions.planning

    def always(self: Any, **options: Any) -> Any:
        return dataclasses.replace(planning(self, **options), min_gain=0.0)

    module.BalancerOptions.planning = always


def tables_change_between_forwards(module: ModuleType) -> None:
    """A commit waits for the second forward of a layer that runs twice in the iteration."""
    layer = module.SingleLayerMoeLoadBalancer
    take_over, route = layer._take_over, layer.route

    def nothing_due(self: Any) -> None:
        self.forwards = 0
        self.updates.commit_due = lambda iteration: False
        take_over(self)
        del self.updates.commit_due

    def commit_late(self: Any, ids: Any, offset_by_ep_rank: bool = False) -> Any:
        self.forwards += 1
        if self.forwards == 2 and self.updates.commit_due(self._device.iteration):
            self._tables.set(self.placement)
        return route(self, ids, offset_by_ep_rank)

    layer._take_over, layer.route = nothing_due, commit_late


BUGS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "stale_weight": ("moe_eplb.balancer.migrate", stale_weight),
    "slot_table_off_by_one": ("moe_eplb.balancer.replica_choice", slot_table_off_by_one),
    "late_commit": ("moe_eplb.balancer.layer_update", late_commit),
    "replica_chosen_by_receiver": ("moe_eplb.moe.wide_ep", replica_chosen_by_receiver),
    "statistics_never_reduced": ("moe_eplb.balancer.statistics", statistics_never_reduced),
    "one_layer_left_out_of_the_sum": ("moe_eplb.balancer.statistics", one_layer_left_out_of_the_sum),
    "loads_from_before_the_sum": ("moe_eplb.device.control.plain_all", loads_from_before_the_sum),
    "missing_stream_join": ("moe_eplb.balancer.layer_stream", missing_stream_join),
    "wrong_axis_balancedness": ("moe_eplb.balancer.single_layer", wrong_axis_balancedness),
    "updates_silently_off": ("moe_eplb.balancer.load_balancer", updates_silently_off),
    "digest_disagreement": ("moe_eplb.core.planner", digest_disagreement),
    "load_never_zeroed": ("moe_eplb.balancer.statistics", load_never_zeroed),
    "other_experts_than_asked": ("moe_eplb.moe.routing", other_experts_than_asked),
    "chunk_reads_without_waiting": ("moe_eplb.balancer.layer_stream", chunk_reads_without_waiting),
    "hand_over_while_a_chunk_reads": ("moe_eplb.balancer.layer_stream", hand_over_while_a_chunk_reads),
    "chunk_result_used_early": ("moe_eplb.moe.chunking", chunk_result_used_early),
    "empty_chunk_counted_again": ("moe_eplb.moe.statistics_path", empty_chunk_counted_again),
    "padding_counted": ("moe_eplb.moe.dispatch.allgather", padding_counted),
    "shared_expert_of_other_tokens": ("moe_eplb.models.shared_expert", shared_expert_of_other_tokens),
    "shared_expert_not_added": ("moe_eplb.models.shared_expert", shared_expert_not_added),
    "scales_in_other_order": ("moe_eplb.moe.routing", scales_in_other_order),
    "second_best_expert": ("moe_eplb.moe.routing", second_best_expert),
    "tables_without_cells": ("moe_eplb.device.control.plain", tables_without_cells),
    "every_vote_counts_as_yes": ("moe_eplb.device.control.plain", every_vote_counts_as_yes),
    "device_keeps_its_load": ("moe_eplb.device.control.plain", device_keeps_its_load),
    "scales_stay_behind": ("moe_eplb.balancer.migrate", scales_stay_behind),
    "scales_stay_behind_in_cells": ("moe_eplb.balancer.cells", scales_stay_behind_in_cells),
    "peer_reads_the_first_cells": ("moe_eplb.balancer.weight_sources", peer_reads_the_first_cells),
    "peers_asked_for_and_the_host_taken": ("moe_eplb.balancer.resident_calls", peers_asked_for_and_the_host_taken),
    "older_wait_not_joined": ("moe_eplb.balancer.older_choreography", older_wait_not_joined),
    "older_statistics_not_joined": ("moe_eplb.balancer.older_choreography", older_statistics_not_joined),
    "vote_without_the_route_that_counts": ("moe_eplb.balancer.resident_layer", vote_without_the_route_that_counts),
    "held_vote_without_the_route_that_counts": (
        "moe_eplb.balancer.layer_stream",
        held_vote_without_the_route_that_counts,
    ),
    "moves_that_do_not_pay": ("moe_eplb.balancer.options", moves_that_do_not_pay),
    "tables_change_between_forwards": ("moe_eplb.balancer.single_layer", tables_change_between_forwards),
    "leaked_segment": ("moe_eplb.balancer.host_weights", leaked_segment),
}
