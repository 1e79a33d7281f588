"""The online balancer over recorded windows, without weights: what a policy would have brought, and what it would cost.

At the end of a window its load is known; every `interval` windows the policy plans from the newest ones, and its
placement serves from the next window on. What users get is the balance on the windows after a plan, not on the one that
it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Loads, Problem, Slots, Solution, gains, rank_loads

__all__ = ["CostModel", "Replayed", "Setting", "best", "replay", "settings_to_try", "why"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a window and a move cost.

    A layer takes as long as its most loaded rank: `us_per_token` for each routed token there. Moves of a plan take
    `slot_bytes` each over links of `link_gb_s`, all ranks at once, of which `hidden` does not lengthen any step.
    """

    us_per_token: float = 0.05
    slot_bytes: int = 44_040_192
    link_gb_s: float = 50.0
    hidden: float = 0.9

    def steps_us(self, tops: Loads) -> float:
        """us of all layers of a window from the largest rank loads [L], in tokens of the whole window."""
        return float(tops.sum()) * self.us_per_token

    def move_us(self, received: NDArray[np.int64]) -> float:
        """us that the moves of a plan lengthen steps by, from the slots that each rank receives [R]."""
        return float(received.max(initial=0)) * self.slot_bytes / (self.link_gb_s * 1e3) * (1 - self.hidden)


@dataclass(frozen=True, slots=True)
class Setting:
    """How the balancer runs: a policy, how often it plans, from how many windows, what it may move and when that pays.

    Raises:
        UsageError: E190 `min_gain` is no share.
    """

    policy: str
    interval: int = 1
    window: int = 8
    move_share: float | None = None
    """Share of all slots that a plan may change; None for all."""
    min_gain: float = 0.0
    """Share by which a plan has to make a layer's balancedness grow for its slots to move; 0 for any plan.

    It is judged on the newest window for every policy, also for ``robust``, which plans from `window` of them. The same
    holds for `moe_eplb.planning.online.Planning`, whose newest load is what the running balancer hands over: a decayed
    sum since the layer's last plan, where a replay has one window. Where a budget cuts a plan short, the whole plan's
    gain counts. A layer without load keeps its slots. ``static`` moves nothing anyway.
    """

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_gain < math.inf:
            hint = "a finite share of at least 0, such as 0.02 for 2 percent"
            raise UsageError("E190", f"min_gain {self.min_gain:g} is no share", hint=hint)

    def __str__(self) -> str:
        budget = "" if self.move_share is None else f", at most {self.move_share:.0%} of the slots"
        gate = f", only where a layer gains {100 * self.min_gain:g}%" if self.min_gain else ""
        return f"{self.policy} every {self.interval} from {self.window}{budget}{gate}"


@dataclass(frozen=True)
class Replayed:
    """What a setting brought over all windows after the first.

    Attributes:
        now, following: Balancedness (sum over layers of the mean rank load / sum of the largest) of each plan on the
            newest window that it was made from, and of each window under the placement that served it.
        unbalanced: The same windows under the first placement.
        moves, received: Slots that changed, all and on the rank that received most.
        steps_us, moves_us: Time of all windows, and what moves added to it.
        plan_ms: The planner's time of each plan.
    """

    setting: Setting
    now: tuple[float, ...]
    following: tuple[float, ...]
    unbalanced: tuple[float, ...]
    moves: int
    received: int
    plans: int
    steps_us: float
    moves_us: float
    plan_ms: tuple[float, ...]

    @property
    def total_us(self) -> float:
        """Steps and moves."""
        return self.steps_us + self.moves_us

    @property
    def mean_following(self) -> float:
        """The mean of what users get."""
        return float(np.mean(self.following)) if self.following else 1.0


def replay(
    counts: Loads, ranks: int, slots: int, setting: Setting, cost: CostModel | None = None, *, seed: int = 0,
    start: Slots | None = None, progress: Progress | None = None,
) -> Replayed:  # fmt: skip
    """Run a setting over windows of loads [W, L, E].

    Args:
        start: The first placement [L, P], by default the initial one of experts in order.
        progress: Told of windows done and of all.
    """
    cost = cost or CostModel()
    loads = np.ascontiguousarray(counts, np.float64)
    first = Problem(loads[:1], ranks, slots, current=start)
    placed = solve(first, "static").slots
    begun, edges = placed.copy(), first.first_slot
    now, following, unbalanced, plan_ms = list[float](), list[float](), list[float](), list[float]()
    moves = received = 0
    steps_us = moves_us = 0.0
    for window in range(len(loads)):
        if window:
            tops = _tops(placed, loads[window], edges)
            steps_us += cost.steps_us(tops)
            following.append(_balance(tops, loads[window], ranks))
            unbalanced.append(_balance(_tops(begun, loads[window], edges), loads[window], ranks))
        if (window + 1) % setting.interval == 0 and window + 1 < len(loads):
            answer = _plan(loads[max(0, window + 1 - setting.window) : window + 1], ranks, slots, setting, placed, seed)
            changed = (answer.slots != placed).reshape(len(placed), ranks, -1).sum(axis=(0, 2))
            moves, received = moves + int(changed.sum()), received + int(changed.max(initial=0))
            moves_us += cost.move_us(changed)
            plan_ms.append(answer.milliseconds)
            placed = answer.slots
            now.append(_balance(_tops(placed, loads[window], edges), loads[window], ranks))
        if progress is not None:
            progress(window + 1, len(loads))
    return Replayed(
        setting, tuple(now), tuple(following), tuple(unbalanced), moves, received, len(plan_ms), steps_us, moves_us,
        tuple(plan_ms),
    )  # fmt: skip


def settings_to_try(policies: Iterable[str], windows: int, min_gain: float = 0.0) -> list[Setting]:
    """A small grid: how often, from how much, how many moves, with and without `min_gain`; at least two plans each."""
    found, gains = list[Setting](), (0.0, min_gain) if min_gain else (0.0,)
    for policy in policies:
        if policy == "static":
            found.append(Setting(policy, interval=max(windows, 1)))
            continue
        budgets: Sequence[float | None] = (None, 0.05, 0.2) if policy in ("incremental", "robust") else (None,)
        for interval in (1, 2, 4, 8, 16):
            if 2 * interval > windows:
                continue
            for window in (1, 4, 16) if policy == "robust" else (1,):
                found += [Setting(policy, interval, window, share, gain) for share in budgets for gain in gains]
    return found


def best(results: Sequence[Replayed]) -> Replayed:
    """The one with the least predicted time; of equals the one that moves least."""
    return min(results, key=lambda one: (one.total_us, one.moves))


def why(chosen: Replayed, results: Sequence[Replayed]) -> list[str]:
    """What speaks for a setting: against doing nothing, and against its neighbours that differ in one thing."""
    lines = []
    still = next((one for one in results if one.setting.policy == "static"), None)
    if still is not None and still is not chosen and chosen.total_us > 0:
        lines.append(
            f"against no balancer: {1 - chosen.total_us / still.total_us:.1%} less time, balancedness "
            f"{still.mean_following:.3f} -> {chosen.mean_following:.3f}"
        )
    for name in ("policy", "interval", "window", "move_share", "min_gain"):
        others = [
            one
            for one in results
            if one is not chosen and replace(one.setting, **{name: getattr(chosen.setting, name)}) == chosen.setting
        ]
        if others:
            nearest = min(others, key=lambda one: one.total_us)
            lines.append(
                f"against {name} {getattr(nearest.setting, name)}: {nearest.total_us / chosen.total_us - 1:+.1%} time "
                f"there, of it moves {nearest.moves_us / max(nearest.total_us, 1e-9):.1%} "
                f"(here {chosen.moves_us / max(chosen.total_us, 1e-9):.1%})"
            )
    return lines


def _plan(windows: Loads, ranks: int, slots: int, setting: Setting, placed: Slots, seed: int) -> Solution:
    """What the setting makes of windows [W, L, E]; layers that would gain too little keep what they have.

    A budget is for the layers that gain enough by a plan without one: the others would spend it and then keep what they
    have, and of a gain that takes several plans each part alone would be too small.
    """
    budget = None if setting.move_share is None else int(setting.move_share * placed.size)
    problem = Problem(windows, ranks, slots, current=placed, seed=seed)
    if not setting.min_gain:
        return solve(replace(problem, max_moves=budget), setting.policy)
    whole = solve(problem, setting.policy)
    now, then = (_tops(slots, problem.newest, problem.first_slot) for slots in (placed, whole.slots))
    pays = gains(now, then) >= setting.min_gain
    if budget is None or not pays.any():
        return replace(whole, slots=np.where(pays[:, np.newaxis], whole.slots, placed))
    held = tuple(np.flatnonzero(~pays).tolist())
    part = solve(replace(problem, max_moves=budget, held=held), setting.policy)
    return replace(part, milliseconds=whole.milliseconds + part.milliseconds)


def _tops(slots: Slots, load: Loads, edges: NDArray[np.int64]) -> Loads:
    tops: Loads = rank_loads(slots, load, edges).max(axis=1)
    return tops


def _balance(tops: Loads, load: Loads, ranks: int) -> float:
    """Of a window without any load 1, since no rank waits for another one."""
    whole = float(tops.sum())
    return float(load.sum()) / ranks / whole if whole > 0 else 1.0
