"""What a plan is worth and what it costs, before anything moves; and whether it pays."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moe_eplb.planning.bounds import Bounds, free_split, lower_bounds
from moe_eplb.planning.decode import DecodeScore, score_decode
from moe_eplb.planning.exact import Optima, believed
from moe_eplb.planning.links import WAYS, Links
from moe_eplb.planning.problem import Loads, Problem, Solution, rank_loads

__all__ = ["Certificate", "LayerRow", "Links", "certify"]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer: the largest rank load in tokens, how balanced it is, its bounds, and what moves.

    `free` is the largest rank load if dispatch divided each expert's tokens among its replicas at best; `bound` is the
    best of `bounds`, and `gap` the share by which the largest load lies above it.
    """

    layer: int
    before: float | None
    largest: float
    balancedness: float
    free: float
    bounds: Bounds
    bound: float
    gap: float
    kept: int
    moved: int


@dataclass(frozen=True)
class Certificate:
    """A plan's worth.

    Attributes:
        balancedness: Sum over layers of the mean rank load / sum of the largest, which is what time goes by.
        mean_balancedness: Mean over layers of mean / largest, as others print it.
        free_balancedness: The first of these if dispatch divided each expert's tokens among its replicas at best.
        before: The first of these for what was there, None if nothing was.
        gap: The share by which all largest loads together lie above their bounds.
        kept, moved: Slots.
        bytes_by_link: Where the moved experts come from: the same rank, the same node, another node.
        migration_ms: Of the rank that receives most, each link at its speed, one after the other.
        saved_us: What one window's steps get shorter by.
        break_even: Windows after which the moves have paid; infinite if never, None if nothing was there.
        pays: Whether the gain is at least what the gate asks for; None without a gate.
        links: What the times of moves and reads go by.
        proved: Layers whose bound is the proved optimum; None where it was not looked for.
        unproved: Why it is missing in the others.
        decode: What a decode step reads; None where no size of one was given.
    """

    policy: str
    ranks: int
    slots: int
    experts: int
    layers: tuple[LayerRow, ...]
    balancedness: float
    mean_balancedness: float
    free_balancedness: float
    before: float | None
    gap: float
    kept: int
    moved: int
    bytes_by_link: dict[str, int]
    migration_ms: float
    saved_us: float | None
    break_even: float | None
    min_gain: float | None
    pays: bool | None
    plan_ms: float
    finished: bool
    notes: tuple[str, ...]
    links: Links
    proved: int | None = None
    unproved: tuple[str, ...] = ()
    decode: DecodeScore | None = None

    @property
    def gain(self) -> float | None:
        """By how much the balancedness grows, as a share of what it was."""
        return None if self.before is None else self.balancedness / self.before - 1

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; an infinite break-even is null, and `moved` tells why."""
        plain = asdict(self) | {"gain": self.gain, "notes": list(self.notes), "unproved": list(self.unproved)}
        if self.break_even is not None and math.isinf(self.break_even):
            plain["break_even"] = None
        return plain


def certify(
    problem: Problem, solution: Solution, links: Links | None = None, min_gain: float | None = None,
    decode_pairs: int | None = None, optima: Optima | None = None,
) -> Certificate:  # fmt: skip
    """The certificate of a plan on the newest window.

    Args:
        min_gain: The least growth of the balancedness, as a share, for which a plan pays.
        decode_pairs: Routed (token, k) pairs of a decode step, to score what it reads too.
        optima: What `prove` found; one that this plan beats is taken as not proved.
    """
    links = links or Links()
    load, edges = problem.newest, problem.first_slot
    largest = rank_loads(solution.slots, load, edges).max(axis=1)
    there = None if problem.current is None else rank_loads(problem.current, load, edges).max(axis=1)
    each_bounds, doubts = _bounds(problem, load, largest, optima)
    bounds = np.array([bound.best for bound in each_bounds])
    free = free_split(problem, solution.slots, load)
    ranks = int((problem.room > 0).sum())
    means = load.sum(axis=1) / ranks
    changed = np.zeros_like(solution.slots, bool) if problem.current is None else solution.slots != problem.current
    balance, before = _ratio(means, largest), None if there is None else _ratio(means, there)
    by_link, milliseconds = _moves(problem, solution, changed, links)
    saved = None if there is None else float((there - largest).sum()) * links.us_per_token
    gain = None if before is None else balance / before - 1
    each = [_one(mean, top) for mean, top in zip(means, largest, strict=True)]
    return Certificate(
        solution.policy, problem.ranks, problem.slots, problem.experts,
        tuple(
            LayerRow(
                layer, None if there is None else float(there[layer]), float(largest[layer]),
                _one(means[layer], largest[layer]), float(free[layer]), each_bounds[layer], float(bounds[layer]),
                _gap(largest[layer], bounds[layer]), int((~changed[layer]).sum()), int(changed[layer].sum()),
            )
            for layer in range(problem.layers)
        ),
        balancedness=balance, mean_balancedness=float(np.mean(each)),
        free_balancedness=_ratio(means, free),
        before=before, gap=_gap(float(largest.sum()), float(bounds.sum())), kept=int((~changed).sum()),
        moved=int(changed.sum()), bytes_by_link=by_link, migration_ms=milliseconds, saved_us=saved,
        break_even=_break_even(saved, milliseconds), min_gain=min_gain,
        pays=None if min_gain is None or gain is None else gain >= min_gain,
        plan_ms=solution.milliseconds, finished=solution.finished, notes=tuple(solution.notes), links=links,
        proved=None if optima is None else sum(bound.optimum is not None for bound in each_bounds), unproved=doubts,
        decode=None if decode_pairs is None else score_decode(
            problem, solution.slots, decode_pairs, links.slot_bytes, links.memory_gb_s
        ),
    )  # fmt: skip


def _bounds(
    problem: Problem, load: Loads, largest: Loads, optima: Optima | None
) -> tuple[list[Bounds], tuple[str, ...]]:
    """The bounds of each layer, with the optima that were proved; and which of these cannot be."""
    plain = lower_bounds(problem, load)
    if optima is None:
        return plain, ()
    kept = believed(optima, largest.tolist(), [bound.best for bound in plain])
    return [replace(bound, optimum=one) for bound, one in zip(plain, kept.of, strict=True)], kept.notes


def _ratio(means: Loads, largest: Loads) -> float:
    whole = float(largest.sum())
    return float(means.sum()) / whole if whole > 0 else 1.0


def _one(mean: float, largest: float) -> float:
    return float(mean / largest) if largest > 0 else 1.0


def _gap(largest: float, bound: float) -> float:
    return float(largest / bound - 1) if bound > 0 else 0.0


def _break_even(saved_us: float | None, milliseconds: float) -> float | None:
    if saved_us is None:
        return None
    return milliseconds * 1e3 / saved_us if saved_us > 0 else math.inf if milliseconds > 0 else 0.0


def _moves(problem: Problem, solution: Solution, changed: np.ndarray, links: Links) -> tuple[dict[str, int], float]:
    """Bytes by link, and ms of the rank that receives longest; each expert comes from the nearest one that holds it."""
    received = {name: np.zeros(problem.ranks, np.int64) for name in WAYS}
    rank_of = np.searchsorted(problem.first_slot, np.arange(problem.slots), side="right") - 1
    node_of = np.arange(problem.ranks) // (problem.ranks // problem.nodes)
    current = problem.current
    for layer, slot in np.argwhere(changed).tolist():
        expert, rank = int(solution.slots[layer, slot]), int(rank_of[slot])
        if current is None or expert < 0:
            continue
        holders = rank_of[np.flatnonzero(current[layer] == expert)]
        if rank in holders:
            received["same_rank"][rank] += 1
        elif node_of[rank] in node_of[holders]:
            received["same_node"][rank] += 1
        else:
            received["cross_node" if len(holders) else "host"][rank] += 1
    seconds = sum(received[name] * links.slot_bytes / (links.speed(name) * 1e9) for name in received)
    longest = float(np.max(seconds)) * 1e3
    return {name: int(count.sum()) * links.slot_bytes for name, count in received.items()}, longest
