"""Damaged copies of scenario files: their structure changed at random places, or their text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from moe_eplb.core import yaml_source

__all__ = ["structure", "text"]

Way = tuple[str | int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]

_NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 63, 65, 1025, 4097, 2**20, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-308, 1e999]
) | st.floats(allow_nan=True)
_WORDS = st.text(max_size=8) | st.sampled_from(
    [
        "",
        "on",
        "null",
        "~",
        "\x00",
        "\x1b[2J",
        "\u2028",
        "\ud800",
        "a" * 500,
        "../..",
        "/dev/zero",
        "--help",
        ">= x",
        "%s",
    ]
)
_LEAVES = st.none() | st.booleans() | _NUMBERS | _WORDS
_JUNK = st.recursive(
    _LEAVES, lambda j: st.lists(j, max_size=3) | st.dictionaries(_WORDS | st.integers(), j, max_size=3), max_leaves=6
)
_SNIPPETS = st.sampled_from(
    [
        *list("{}[]:,-#&*!|>'\"%@`~?\t\n\r\x00\x07\x85\u2028\ufeff"),
        "---\n",
        "...\n",
        "<<: ",
        "!!int ",
        "\\uD800",
        "9" * 50,
    ]
)


@st.composite
def structure(draw: Draw, source: str) -> str:
    """The text of a scenario with one to three of its values replaced, removed, renamed, doubled or moved."""
    data = copy.deepcopy(yaml_source.load(source, "source").data)
    for _ in range(draw(st.integers(1, 3))):
        ways = list(_ways(data, ()))
        if not ways:
            break
        operation = draw(st.sampled_from([_replace, _remove, _rename, _double, _swap, _wrap, _nudge]))
        operation(draw, data, draw(st.sampled_from(ways)), ways)
    return yaml_source.dump(data)


@st.composite
def text(draw: Draw, source: str) -> str:
    """The text of a scenario with one to three spans removed, replaced, inserted or doubled, or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(source)))
        stop = min(len(source), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from(["", "cut", "line"]) | _SNIPPETS | st.text(max_size=4))
        if new == "cut":
            source = source[:start]
        elif new == "line":
            lines = source.splitlines(keepends=True)
            at = start % max(1, len(lines))
            source = "".join([*lines[: at + 1], *lines[at:]])
        else:
            source = source[:start] + new + source[stop:]
    return source


def _ways(node: Any, way: Way) -> Iterator[Way]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*way, key)
        yield from _ways(value, (*way, key))


def _parent(data: Any, way: Way) -> Any:
    """The mapping or list that holds what `way` leads to; None when an earlier step took it away."""
    for step in way[:-1]:
        data = _get(data, step)
    return data if _holds(data, way[-1]) else None


def _get(node: Any, step: str | int) -> Any:
    return node[step] if _holds(node, step) else None


def _holds(node: Any, step: str | int) -> bool:
    if isinstance(node, dict):
        return step in node
    return isinstance(node, list) and isinstance(step, int) and step < len(node)


def _replace(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    _parent(data, way)[way[-1]] = draw(_JUNK)


def _remove(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    del _parent(data, way)[way[-1]]


def _rename(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    parent = _parent(data, way)
    if isinstance(parent, dict):
        parent[draw(_WORDS | st.integers() | st.sampled_from([f"{way[-1]}s", str(way[-1])[:-1]]))] = parent.pop(way[-1])


def _double(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    parent, value = _parent(data, way), copy.deepcopy(_get(_parent(data, way), way[-1]))
    if isinstance(parent, list):
        parent.extend([value] * draw(st.sampled_from([1, 2, 70])))
    else:
        data[draw(st.sampled_from([str(way[-1]), *data]))] = value


def _swap(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    other = draw(st.sampled_from(ways))
    first, second = _parent(data, way), _parent(data, other)
    mine, theirs = copy.deepcopy(first[way[-1]]), copy.deepcopy(second[other[-1]])
    first[way[-1]] = theirs
    if _holds(second, other[-1]):
        second[other[-1]] = mine


def _wrap(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    parent = _parent(data, way)
    for _ in range(draw(st.sampled_from([1, 2, 40]))):
        parent[way[-1]] = [parent[way[-1]]] if draw(st.booleans()) else {str(way[-1]): parent[way[-1]]}


def _nudge(draw: Draw, data: Any, way: Way, ways: list[Way]) -> None:
    """A change that often leaves the scenario acceptable."""
    parent = _parent(data, way)
    value = parent[way[-1]]
    if isinstance(value, bool):
        parent[way[-1]] = not value
    elif isinstance(value, int | float):
        parent[way[-1]] = draw(st.sampled_from([value - 1, value + 1, value * 2, value // 2, 0, 1]))
    elif isinstance(value, str):
        known = [
            "allgather",
            "alltoall",
            "symm_mem",
            "serial",
            "zipf",
            "hot",
            "burst",
            "model",
            "prefill",
            "local_first",
            "wide_ep",
        ]
        parent[way[-1]] = draw(st.sampled_from(known))
