"""DeepSeek's balancer (github.com/deepseek-ai/EPLB) in plain Python, written from its description alone.

It shares nothing with what it is held against: no arrays, one item after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["placed", "rank_loads"]


def placed(load: Sequence[float], slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """The expert of each slot: groups packed onto nodes, replicas chosen and packed onto ranks within each node.

    With groups that do not divide by nodes all experts are one group on one node. Ties go to what comes first.
    """
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    sums = [sum(load[group * size : (group + 1) * size]) for group in range(groups)]
    result: list[int] = []
    for held in _packed(sums, nodes):
        members = [expert for group in held for expert in range(group * size, (group + 1) * size)]
        replicas = _replicas([load[expert] for expert in members], slots // nodes)
        shares = [load[members[one]] / replicas.count(one) for one in replicas]
        for on_rank in _packed(shares, ranks // nodes):
            result.extend(members[replicas[replica]] for replica in on_rank)
    return result


def rank_loads(load: Sequence[float], row: Sequence[int], ranks: int) -> list[float]:
    """Load of each rank, if the replicas of an expert share it equally."""
    size = len(row) // ranks
    return [sum(load[e] / list(row).count(e) for e in row[r * size : (r + 1) * size]) for r in range(ranks)]


def _replicas(load: Sequence[float], slots: int) -> list[int]:
    """One replica of each, then always one more of that whose replicas have the most each."""
    made = list(range(len(load)))
    counts = [1] * len(load)
    while len(made) < slots:
        most = max(range(len(load)), key=lambda one: load[one] / counts[one])
        made.append(most)
        counts[most] += 1
    return made


def _packed(weights: Sequence[float], bins: int) -> list[list[int]]:
    """Items in bins of equally many: the heaviest first, each into the lightest bin with room; single ones in order."""
    room = len(weights) // bins
    if room == 1:
        return [[item] for item in range(len(weights))]
    found: list[list[int]] = [[] for _ in range(bins)]
    sums = [0.0] * bins
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        chosen = min((b for b in range(bins) if len(found[b]) < room), key=lambda b: sums[b])
        found[chosen].append(item)
        sums[chosen] += weights[item]
    return found
