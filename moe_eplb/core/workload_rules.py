"""What must hold within the workload section of a scenario, and between it and the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_eplb.core import workload_aim_rules
from moe_eplb.core.problem import Problem
from moe_eplb.core.workload_tokens import most_tokens, spread
from moe_eplb.core.yaml_source import Loc

if TYPE_CHECKING:
    from moe_eplb.core.scenario_model import Scenario

__all__ = ["problems"]

_MOST_TOKENS = 1 << 20
_OF_KIND = {
    "skew": ("zipf",),
    "hot_experts": ("hot", "spread_hot", "rotating", "burst"),
    "hot_share": ("hot", "hot_rank", "spread_hot", "rotating", "burst"),
    "hot_rank": ("hot_rank",),
    "idle_experts": ("idle",),
    "idle_rank": ("idle",),
    "burst_every": ("burst",),
    "burst_factor": ("burst",),
    "drift_every": ("zipf", "hot", "rotating"),
    "path": ("recorded",),
    "order": ("recorded",),
}
_OF_STEPS = {"prompt_tokens": ("prefill", "mixed", "generate"), "ragged": ("decode", "prefill", "mixed")}
_LOC: Loc = ("workload",)


def problems(s: Scenario) -> Iterator[Problem]:
    """Everything wrong with the workload of a scenario."""
    yield from _without_effect(s)
    yield from _kind(s)
    tokens = s.workload.tokens_per_rank
    if isinstance(tokens, tuple) and len(tokens) != s.ranks:
        yield _problem("tokens_per_rank", f"{len(tokens)} numbers of tokens for {s.ranks} ranks")
    elif s.calls is None:
        yield from _amount(s)
    yield from workload_aim_rules.problems(s)


def _problem(key: str, what: str, hint: str = "") -> Problem:
    return Problem((*_LOC, key), what, hint)


def _without_effect(s: Scenario) -> Iterator[Problem]:
    work = s.workload
    for of_what, given, table in (("kind", work.kind, _OF_KIND), ("steps", work.steps, _OF_STEPS)):
        for name, fitting in table.items():
            if given not in fitting and _is_set(work, name):
                hint = f"remove it, or use {of_what} {' or '.join(fitting)}"
                yield _problem(name, f"{name!r} has no effect with {of_what} {given!r}", hint)
    if work.kind == "recorded" and work.ragged:
        yield _problem(
            "ragged", "'ragged' does not go with kind 'recorded', whose file is shared out evenly", "remove it"
        )


def _is_set(section: Any, name: str) -> bool:
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _kind(s: Scenario) -> Iterator[Problem]:
    work = s.workload
    if work.kind == "recorded" and not work.path:
        yield _problem("path", "a recorded workload needs the path of its file", "add 'path: loads.npz'")
    if work.kind in _OF_KIND["hot_experts"] and work.hot_experts > s.model.experts:
        yield _problem("hot_experts", f"{work.hot_experts} hot experts of only {s.model.experts}")
    if work.kind == "burst" and s.calls is None and work.burst_every > s.iterations:
        what = f"burst_every {work.burst_every} is more than the {s.iterations} iterations: there is no burst"
        yield _problem("burst_every", what, f"burst_every: {s.iterations} or less")
    for name in ("hot_rank", "idle_rank"):
        rank = getattr(work, name)
        if rank is not None and rank >= s.ranks:
            yield _problem(name, f"there is no rank {rank}: ranks are 0 to {s.ranks - 1}")


def _amount(s: Scenario) -> Iterator[Problem]:
    work, most = s.workload, max(most_tokens(s, rank) for rank in range(s.ranks))
    if most == 0:
        yield _problem("tokens_per_rank", "no rank has any token", "give at least one rank a token")
    elif work.ragged and spread(most, work.ragged) == 0:
        what = f"'ragged' has no effect: {work.ragged:g} of at most {most} tokens is less than one"
        yield _problem("ragged", what, f"ragged: {math.ceil(1000 / most) / 1000:g} or more")
    elif most > _MOST_TOKENS:
        keys = [name for name in ("prompt_tokens", "burst_factor", "ragged") if _is_set(work, name)]
        what = f"up to {most} tokens of a rank in an iteration, {_MOST_TOKENS} are the most"
        yield _problem("tokens_per_rank", what, f"lower {' or '.join(['tokens_per_rank', *keys])}")
