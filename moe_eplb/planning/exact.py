"""The optimum of a layer where it can be proved, held against what plans reach.

HiGHS (scipy) looks for it as a program of whole numbers. It is not always right about what it calls proved: comments
say what is done about that, and `believed` sees to it that no plan is measured by what it beats.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.bounds import lower_bounds
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem, Solution, rank_loads

__all__ = ["Optima", "believed", "exact_optimum", "prove", "require_provable"]

_MOST_SLOTS = 64
"""Beyond which the optimum is not looked for."""
_ROUNDING = 1e-6
"""Share by which figures of the solver may be wrong, and which a proof may leave open."""
_SLACK = 1e-4
"""Share above what a plan reaches up to which the solver may look: right there it sometimes finds nothing at all."""
_ORDERED = 10
"""Experts, heaviest first, by which ranks are ordered; their weights are powers of two."""


def exact_optimum(load: Sequence[float], ranks: int, slots: int, *, time_limit_s: float = 10.0) -> float | None:
    """The least largest rank load of one layer [E], proved by HiGHS (scipy), or None without a proof in time.

    Replicas of an expert lie on different ranks and share its load equally.

    Raises:
        UsageError: E192 scipy is not installed, or the case is too large. E190 it is no problem.
    """
    _require_solver(slots)
    whole = float(sum(load))
    if whole <= 0:
        return 0.0
    # In units of the mean rank load: the solver's tolerances are absolute ones.
    problem = Problem(np.array([load], float) * (ranks / whole), ranks, slots)
    reached = float(rank_loads(solve(problem, "refine").slots, problem.newest, problem.first_slot).max())
    bound = lower_bounds(problem, problem.newest)[0].best
    if reached > bound * (1 + 1e-12):
        found = _solved(_program(problem.newest[0], ranks, slots, reached), bound, reached, time_limit_s)
        return None if found is None else min(found, reached) * whole / ranks
    return reached * whole / ranks


class _Program:
    """Whole numbers: y[i] chooses a kind (expert e, k replicas), x[i, r] puts one of them on rank r.

    Attributes:
        kinds: The (e, k).
        shares: What a replica of each kind carries.
        rows, low, high: Factors of the columns y, x and the largest rank load; the least and largest of each row.
    """

    def __init__(self, kinds: list[tuple[int, int]], shares: np.ndarray, ranks: int, rows: int) -> None:
        from scipy.sparse import lil_matrix

        self.kinds, self.shares, self._ranks = kinds, shares, ranks
        self._made = lil_matrix((rows, len(kinds) * (ranks + 1) + 1))
        self.low, self.high = list[float](), list[float]()

    @property
    def rows(self) -> Any:
        """Those that were added."""
        return self._made.tocsr()[: len(self.low)]

    def x(self, kind: int, rank: int) -> int:
        """The column."""
        return len(self.kinds) + kind * self._ranks + rank

    def add(self, terms: dict[int, float], least: float, largest: float) -> None:
        """A row."""
        for column, factor in terms.items():
            self._made[len(self.low), column] = factor
        self.low.append(least)
        self.high.append(largest)


def _solved(program: _Program, bound: float, reached: float, time_limit_s: float) -> float | None:
    """The optimum between what is known to be a bound and what a plan reaches; None if it is not proved."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    columns = program.rows.shape[1]
    goal, integral, bottom, top = np.zeros(columns), np.ones(columns), np.zeros(columns), np.ones(columns)
    goal[-1], integral[-1], bottom[-1], top[-1] = 1.0, 0.0, bound * (1 - _ROUNDING), reached * (1 + _SLACK)
    # Presolve is off: with it HiGHS 1.12 (scipy 1.17) calls 1.497 the optimum of 5 experts on 4 ranks of 2 slots where
    # 1.430 can be reached. It saves no time on these programs.
    answer = milp(
        goal, integrality=integral, bounds=Bounds(bottom, top),
        constraints=LinearConstraint(program.rows, program.low, program.high),
        options={"time_limit": time_limit_s, "presolve": False, "mip_rel_gap": _ROUNDING},
    )  # fmt: skip
    if answer.status != 0:
        return None
    kinds = len(program.shares)
    held = np.rint(answer.x[kinds:-1]).reshape(kinds, -1)
    return float((program.shares @ held).max())


def _program(load: np.ndarray, ranks: int, slots: int, reached: float) -> _Program:
    """The program of a layer's load [E], with the kinds that a plan no worse than what is `reached` can have."""
    needed = [max(1, math.ceil(one / (reached * (1 + _SLACK)))) for one in load.tolist()]
    spare = slots - sum(needed)
    kinds = [(e, k) for e, least in enumerate(needed) for k in range(least, min(ranks, least + spare) + 1)]
    shares = np.array([load[e] / k for e, k in kinds])
    made = _Program(kinds, shares, ranks, 2 * len(load) + len(kinds) * (ranks + 1) + 3 * ranks)
    for e in range(len(load)):
        made.add({i: 1.0 for i, kind in enumerate(kinds) if kind[0] == e}, 1, 1)
    for i, (_, k) in enumerate(kinds):
        made.add({made.x(i, r): 1.0 for r in range(ranks)} | {i: -float(k)}, 0, 0)
        for r in range(ranks):
            made.add({made.x(i, r): 1.0, i: -1.0}, -np.inf, 0)
    for r in range(ranks):
        made.add({made.x(i, r): 1.0 for i in range(len(kinds))}, slots // ranks, slots // ranks)
        weighed = {made.x(i, r): share for i, share in enumerate(shares.tolist())}
        made.add(weighed | {len(kinds) * (ranks + 1): -1.0}, -np.inf, 0)
    _order(made, load, ranks)
    return made


def _order(made: _Program, load: np.ndarray, ranks: int) -> None:
    """Of placements that differ by the names of ranks, or of experts with one load, leave one.

    Without this HiGHS 1.12 finds that ranks can be exchanged, and what it makes of that cuts off optima: one of 5
    experts on 4 ranks came out 2.4 % too high.
    """
    heaviest = np.argsort(-load, kind="stable").tolist()
    weight = {e: 2.0**-place for place, e in enumerate(heaviest[:_ORDERED])}
    ordered = [(i, weight[e]) for i, (e, _) in enumerate(made.kinds) if e in weight]
    for r in range(1, ranks):
        here, before = ({made.x(i, rank): factor for i, factor in ordered} for rank in (r, r - 1))
        made.add(before | {column: -factor for column, factor in here.items()}, 0, np.inf)
    for one, other in pairwise(heaviest):
        if load[one] == load[other]:
            signs = {one: 1.0, other: -1.0}
            made.add({i: signs[e] * k for i, (e, k) in enumerate(made.kinds) if e in signs}, 0, np.inf)


@dataclass(frozen=True)
class Optima:
    """What is known of the least largest rank load of each layer.

    Attributes:
        of: The proved ones, None where there is no proof [L].
        notes: Why some are missing.
    """

    of: tuple[float | None, ...]
    notes: tuple[str, ...] = ()


def require_provable(problem: Problem) -> None:
    """E192 unless optima of this problem can be looked for: few slots, as many on each rank, no duplicates, scipy."""
    if problem.allow_duplicates:
        hint = "leave out --allow-duplicates or --exact"
        raise UsageError("E192", "the exact optimum is one without duplicates of an expert on a rank", hint=hint)
    if not problem.plain:
        why = f"{sorted(set(problem.room.tolist()))} slots may be used on ranks"
        raise UsageError("E192", "the exact optimum is one of ranks with equal room", why=why)
    _require_solver(problem.slots)


def prove(
    problem: Problem, solutions: Sequence[Solution], seconds: float, progress: Callable[[int, int], None] | None = None
) -> Optima:
    """Look for the optimum of each layer of the newest window, for at most so many seconds each.

    A layer in which one of the solutions reaches its bound needs no search.

    Raises:
        UsageError: E192 see `require_provable`.
    """
    require_provable(problem)
    load = problem.newest
    reached = np.min([rank_loads(one.slots, load, problem.first_slot).max(axis=1) for one in solutions], axis=0)
    bounds = [bound.best for bound in lower_bounds(problem, load)]
    found = list[float | None]()
    for layer, (row, least, bound) in enumerate(zip(load, reached.tolist(), bounds, strict=True)):
        known = least <= bound * (1 + 1e-12)
        found.append(
            least if known else exact_optimum(row.tolist(), problem.ranks, problem.slots, time_limit_s=seconds)
        )
        if progress is not None:
            progress(layer + 1, problem.layers)
    open_layers = sum(one is None for one in found)
    late = (f"not proved in {_layers(open_layers)}, with {seconds:g} s for each",) if open_layers else ()
    return believed(Optima(tuple(found), late), reached.tolist(), bounds)


def believed(optima: Optima, reached: Sequence[float], bounds: Sequence[float]) -> Optima:
    """Without those that cannot be: above the largest load [L] that a placement has, or below a bound [L]."""
    kept, notes = list[float | None](), list(optima.notes)
    for layer, (one, top, bound) in enumerate(zip(optima.of, reached, bounds, strict=True)):
        if one is not None and not bound * (1 - _ROUNDING) <= one <= top * (1 + _ROUNDING):
            wrong = f"above the {top:,.6g} that a plan reaches" if one > top else f"below the bound of {bound:,.6g}"
            what = f"layer {layer} (counted from 0): the solver's optimum of {one:,.6g} is {wrong}"
            notes.append(f"{what}, and taken as not proved")
            one = None
        kept.append(None if one is None else min(one, top))
    return Optima(tuple(kept), tuple(notes))


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _require_solver(slots: int) -> None:
    if importlib.util.find_spec("scipy") is None:
        hint = "pip install 'moe-eplb[bound]'"
        raise UsageError("E192", "the exact optimum needs scipy, which is not installed", hint=hint)
    if slots > _MOST_SLOTS:
        raise UsageError("E192", f"{slots} slots are too many for an exact optimum", why=f"at most {_MOST_SLOTS}")
