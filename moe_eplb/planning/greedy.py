"""DeepSeek's published algorithm on a problem, and when a policy has to answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from moe_eplb.planning.problem import Loads, Problem, Slots

__all__ = ["CHUNK", "Clock", "greedy_of"]

CHUNK = 4
"""Layers that are worked on between two looks at the clock."""


@dataclass
class Clock:
    """When to answer."""

    end: float

    @property
    def over(self) -> bool:
        """Whether it is time."""
        return time.perf_counter() >= self.end


def greedy_of(problem: Problem, load: Loads) -> Slots:
    """Greedy for a load [L, E], flat or hierarchical as the problem asks."""
    from moe_eplb.planning import kernels

    slots = np.empty((problem.layers, problem.slots), np.int32)
    nodes, groups = problem.nodes, problem.groups
    if groups % nodes or problem.experts % groups or not problem.plain:
        nodes = groups = 1  # as published: what does not divide is one flat group
    kernels.greedy_layers(load, problem.first_slot, problem.room, nodes, groups, problem.allow_duplicates, slots)
    return slots
