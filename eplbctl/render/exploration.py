"""The results of a search of the call order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eplbctl.render.text import table
from moe_eplb.core.explore import Exploration, IterMove, unreached

__all__ = ["Searches", "json_text", "text"]


@dataclass(frozen=True)
class Searches:
    """Searches by what was searched."""

    by_name: Mapping[str, Exploration[Any, Any]]

    @property
    def unreached(self) -> list[str]:
        """Codes that no sequence of calls leads to."""
        return sorted(unreached(self.by_name.values()))

    @property
    def sound(self) -> bool:
        """Whether every state has a way on and a way back, and every rule can be broken."""
        stuck = any(search.dead_ends or search.stranded for search in self.by_name.values())
        return not stuck and not self.unreached


def text(searches: Searches) -> str:
    """Sizes of the searches, then the shortest way to every violation."""
    headers = ("search", "states", "legal calls", "dead ends", "no way back")
    rows = [
        (name, len(found.states), found.transitions, len(found.dead_ends), len(found.stranded))
        for name, found in searches.by_name.items()
    ]
    parts = [table(headers, rows)]
    for name, found in searches.by_name.items():
        lines = [f"  {code}  {' -> '.join(map(_move, way))}" for code, way in sorted(found.violations.items())]
        parts.append("\n".join([f"Shortest way to each violation ({name}):", *lines]))
    parts.append(f"Rules that no sequence can break: {', '.join(searches.unreached) or 'none'}")
    return "\n\n".join(parts)


def json_text(searches: Searches) -> str:
    """The same for programs."""
    found = [
        {
            "search": name,
            "states": len(search.states),
            "transitions": search.transitions,
            "dead_ends": len(search.dead_ends),
            "stranded": len(search.stranded),
            "violations": {code: [_move(move) for move in way] for code, way in sorted(search.violations.items())},
        }
        for name, search in searches.by_name.items()
    ]
    return json.dumps({"schema": 1, "searches": found, "unreached": searches.unreached}, indent=2)


def _move(move: object) -> str:
    if not isinstance(move, IterMove):
        return str(move)
    arguments = [f"layer={move.layer}"] if move.layer >= 0 else []
    arguments += [f"iteration={move.iteration}"] if move.iteration is not None else []
    arguments += [f"unfinished={list(move.unfinished)}"] if move.unfinished else []
    return f"{move.call}({', '.join(arguments)})"
