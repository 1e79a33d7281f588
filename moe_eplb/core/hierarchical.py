"""DeepSeek's published expert-parallel load balancer, hierarchical and global, for offline placements.

The algorithm of github.com/deepseek-ai/EPLB: pack expert groups onto nodes, replicate within each node, pack the
replicas onto the node's GPUs. With groups that do not divide by nodes everything is one group on one node.
"""

from __future__ import annotations

import numpy as np

from moe_eplb.core.errors import BalancerError

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Placements of L layers.

    Args:
        weight: Load [L, E].
        num_replicas: P, a multiple of `num_gpus`.
        num_groups, num_nodes, num_gpus: Expert groups, nodes, and R ranks.

    Returns:
        phy2log int64 [L, P], the expert of each slot; log2phy int64 [L, E, X], the slots of each expert in order of
        creation, padded with -1; logcnt int64 [L, E], the replicas of each expert.
    """
    weight = np.asarray(weight, dtype=np.float64)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check(weight.shape[1], num_replicas, num_groups, num_nodes, num_gpus)
    layers = [_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in weight]
    phy2log = np.stack([slots for slots, _ in layers])
    ranks = np.stack([replica for _, replica in layers])
    logcnt = np.stack([np.bincount(slots, minlength=weight.shape[1]) for slots in phy2log])
    log2phy = np.full((*weight.shape, int(logcnt.max())), -1, dtype=np.int64)
    for layer, (slots, replica) in enumerate(zip(phy2log, ranks, strict=True)):
        log2phy[layer, slots, replica] = np.arange(num_replicas)
    return phy2log, log2phy, logcnt


def _check(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if replicas % gpus or replicas < experts:
        nearest = max(-(-experts // gpus), round(replicas / gpus)) * gpus
        why = "they must be a multiple of the ranks and at least as many as the experts"
        text = f"{replicas} slots do not fit {experts} experts on {gpus} ranks"
        raise BalancerError("E131", text, why=why, hint=f"use {nearest} slots")
    if experts % groups or gpus % nodes:
        raise BalancerError(
            "E131", "groups, nodes and ranks do not fit together",
            why=f"{experts} experts in {groups} groups, {gpus} ranks on {nodes} nodes",
            hint="experts must divide by groups and ranks by nodes",
        )  # fmt: skip


def _layer(weight: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each slot [P], and which replica of it the slot holds [P]."""
    experts = len(weight)
    group_size, per_node = experts // groups, experts // nodes
    group_load = weight.reshape(groups, group_size).sum(axis=1)
    node_of_group, position = _pack(group_load, nodes)
    # Experts in the order of their nodes: within a node by the group's position.
    order = np.empty(experts, dtype=np.int64)
    for group in range(groups):
        first = (node_of_group[group] * (groups // nodes) + position[group]) * group_size
        order[first : first + group_size] = np.arange(group * group_size, (group + 1) * group_size)
    slots, replica = [], []
    for node in range(nodes):
        members = order[node * per_node : (node + 1) * per_node]
        chosen, number = _replicate(weight[members], replicas // nodes)
        arranged = _arrange(weight[members], chosen, gpus // nodes)
        slots.append(members[chosen[arranged]])
        replica.append(number[arranged])
    return np.concatenate(slots), np.concatenate(replica)


def _replicate(weight: np.ndarray, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """Expert of each replica in order of creation, and its number among the expert's; ties: the lower expert."""
    experts = len(weight)
    counts = np.ones(experts, dtype=np.int64)
    chosen, number = list(range(experts)), [0] * experts
    for _ in range(replicas - experts):
        expert = int(np.argmax(weight / counts))
        chosen.append(expert)
        number.append(int(counts[expert]))
        counts[expert] += 1
    return np.array(chosen), np.array(number)


def _arrange(weight: np.ndarray, chosen: np.ndarray, gpus: int) -> np.ndarray:
    """Replicas in slot order: packed onto the GPUs by their load."""
    counts = np.bincount(chosen, minlength=len(weight))
    gpu, position = _pack((weight / counts)[chosen], gpus)
    per_gpu = len(chosen) // gpus
    arranged = np.empty(len(chosen), dtype=np.int64)
    arranged[gpu * per_gpu + position] = np.arange(len(chosen))
    return arranged


def _pack(weight: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Bin of each item and its position there: heaviest first, each to the lightest bin that is not full."""
    capacity = len(weight) // bins
    if capacity == 1:
        return np.arange(len(weight)), np.zeros(len(weight), dtype=np.int64)
    load, used = np.zeros(bins), np.zeros(bins, dtype=np.int64)
    where, position = np.empty(len(weight), dtype=np.int64), np.empty(len(weight), dtype=np.int64)
    for item in np.argsort(-weight, kind="stable"):
        chosen = int(np.argmin(np.where(used < capacity, load, np.inf)))
        where[item], position[item] = chosen, used[chosen]
        load[chosen] += weight[item]
        used[chosen] += 1
    return where, position
