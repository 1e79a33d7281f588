"""Changes to a scenario from the command line: ``model.layers=2``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.yaml_source import Document, Loc

__all__ = ["apply"]

# Metric names hold dots themselves, so what follows this is one key.
_METRICS = "checks.thresholds."


def apply(document: Document, overrides: Sequence[str]) -> Document:
    """The document with values replaced or added; each knows as its place the override it came from.

    Raises:
        ScenarioError: E033 when an override has no ``=``, no path, or leads through something that is no mapping.
    """
    changed = Document(copy.deepcopy(document.data), document.name, dict(document.keys), dict(document.values))
    for text in overrides:
        path, equals, value = text.partition("=")
        loc = _loc(path.strip())
        if not equals or not loc or "" in loc or len(loc) > yaml_source.MAX_DEPTH:
            raise ScenarioError("E033", f"the override {text!r} does not parse", hint="write 'section.key=value'")
        _set(changed, loc, yaml_source.load(value, f"override {text!r}").data if value.strip() else None, text)
    return changed


def _loc(path: str) -> Loc:
    if path.startswith(_METRICS):
        return ("checks", "thresholds", path.removeprefix(_METRICS))
    steps = path.split(".") if path else []
    return tuple(int(step) if step.isdecimal() and len(step) < 9 else step for step in steps)


def _set(document: Document, loc: Loc, value: Any, text: str) -> None:
    place = f"override {text!r}"
    node = document.data
    for depth, step in enumerate(loc[:-1]):
        child = _child(node, step, text)
        if child is None:
            child = node[step] = {}
            document.values[loc[: depth + 1]] = document.keys[loc[: depth + 1]] = place
        node = child
    _child(node, loc[-1], text)
    node[loc[-1]] = value
    document.values[loc] = document.keys[loc] = place


def _child(node: Any, step: str | int, text: str) -> Any:
    if isinstance(node, dict):
        return node.get(step)
    if isinstance(node, list) and isinstance(step, int) and step < len(node):
        return node[step]
    raise ScenarioError("E033", f"the override {text!r} leads nowhere", why=f"there is no place for {step!r}")
