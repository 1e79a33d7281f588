"""The table that says which host ranges are calls of the balancer, as YAML: ours, one for TensorRT-LLM, and users'."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError, TraceError
from moe_eplb.core.events import Kind, by_name

__all__ = ["SHIPPED", "CallNames", "CallRule", "KernelRule", "Source", "load_call_names"]

_BUILT_IN = "call_names.yaml"
SHIPPED = {"tensorrt_llm": "call_names_tensorrt_llm.yaml"}
"""Tables that come along and are asked for by name."""
_KIND, _ITERATION = "kind", "iteration"
_LONGEST = 1000


class Source(enum.StrEnum):
    """Where the number of a call's layer or iteration stands. What is not there is looked for in the next one."""

    GROUP = "group"
    PAYLOAD = "payload"
    ENCLOSING = "enclosing"
    COUNTED = "counted"


@dataclass(frozen=True, slots=True)
class CallRule:
    """A call by patterns of its range. `kind` None takes it from the group ``call``.

    `whole`: the range is an iteration from its start to its end, and not a call.
    """

    domain: re.Pattern[str]
    text: re.Pattern[str]
    kind: Kind | None
    layer: Source
    iteration: Source
    whole: bool = False

    def match(self, domain: str, text: str) -> tuple[Kind, int, int] | None:
        """Kind, and layer and iteration where the text names them, else -1; None if the range is something else."""
        found = self.text.search(text) if self.domain.search(domain) else None
        if found is None:
            return None
        kind = by_name(found["call"] or "") if self.kind is None else self.kind
        return None if kind is None else (kind, _group(found, "layer"), _group(found, "iteration"))


@dataclass(frozen=True, slots=True)
class KernelRule:
    """What a kernel is of, by a pattern of its name."""

    name: re.Pattern[str]
    kind: Kind


@dataclass(frozen=True)
class CallNames:
    """All rules, in the order in which they are asked."""

    calls: tuple[CallRule, ...] = ()
    kernels: tuple[KernelRule, ...] = ()
    iterations: tuple[re.Pattern[str], ...] = ()
    layers: tuple[re.Pattern[str], ...] = ()

    def before(self, other: CallNames) -> CallNames:
        """Both tables, this one's rules first."""
        return CallNames(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def by_kernel(self, name: str) -> Kind | None:
        """What a kernel is of, by its name alone."""
        return next((rule.kind for rule in self.kernels if rule.name.search(name)), None)


def load_call_names(tables: Sequence[Path | str] = ()) -> CallNames:
    """The built-in table behind others, the first of which is asked first.

    Args:
        tables: Files, or names of `SHIPPED`; a file of such a name is given as ``./name``.

    Raises:
        TraceError: E070 a table is not acceptable.
    """
    names = _shipped(_BUILT_IN)
    for table in reversed(tables):
        names = _load(table).before(names)
    return names


def _load(table: Path | str) -> CallNames:
    if table in SHIPPED:
        return _shipped(SHIPPED[str(table)])
    path = Path(table)
    try:
        document = yaml_source.load(yaml_source.read_text(path), str(path))
    except ScenarioError as error:
        hint = f"give a file, or one of {', '.join(SHIPPED)}"
        raise TraceError(
            "E070", "a table of calls cannot be read", why=str(error), hint=hint, where=str(path)
        ) from error
    return _Parser(document).names()


@cache
def _shipped(file: str) -> CallNames:
    text = resources.files("moe_eplb.analysis").joinpath(file).read_text(encoding="utf-8")
    return _Parser(yaml_source.load(text, file)).names()


def _group(found: re.Match[str], name: str) -> int:
    text = found.groupdict().get(name) or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


class _Parser:
    """Turns plain data into rules; what it does not know is refused, since a rule that is ignored misleads."""

    def __init__(self, document: yaml_source.Document) -> None:
        self._document = document

    def names(self) -> CallNames:
        data = self._mapping(self._document.data, (), CallNames.__dataclass_fields__)
        return CallNames(
            calls=tuple(self._call(rule, at) for rule, at in self._rules(data, "calls")),
            kernels=tuple(self._kernel(rule, at) for rule, at in self._rules(data, "kernels")),
            iterations=tuple(self._numbered(rule, at) for rule, at in self._rules(data, "iterations")),
            layers=tuple(self._numbered(rule, at) for rule, at in self._rules(data, "layers")),
        )

    def _call(self, rule: Any, at: yaml_source.Loc) -> CallRule:
        rule = self._mapping(rule, at, ("domain", "text", "call", "layer", "iteration"))
        domain = self._pattern(rule.get("domain", ""), (*at, "domain"))
        text = self._pattern(rule.get("text"), (*at, "text"))
        call = rule.get("call")
        layer, iteration = (self._source(rule, name, text, at) for name in ("layer", "iteration"))
        if layer is iteration is Source.PAYLOAD:
            raise self._refused("layer and iteration cannot both be the payload", "it is one number", at)
        if call == _ITERATION:
            return CallRule(domain, text, Kind.START_ITER, layer, iteration, whole=True)
        if call == _KIND and "call" not in text.groupindex:
            raise self._refused("the pattern needs a group named call", text.pattern, (*at, "text"))
        return CallRule(domain, text, None if call == _KIND else self._kind(call, (*at, "call")), layer, iteration)

    def _kernel(self, rule: Any, at: yaml_source.Loc) -> KernelRule:
        rule = self._mapping(rule, at, ("name", "kind"))
        return KernelRule(self._pattern(rule.get("name"), (*at, "name")), self._kind(rule.get("kind"), (*at, "kind")))

    def _source(self, rule: dict[str, Any], name: str, text: re.Pattern[str], at: yaml_source.Loc) -> Source:
        """By default the group, if the pattern has it, else a range around the call."""
        grouped = name in text.groupindex
        value = rule.get(name, Source.GROUP if grouped else Source.ENCLOSING)
        if value not in list(Source):
            raise self._refused("there is no such place of a number", f"{value!r}, of {', '.join(Source)}", (*at, name))
        if value == Source.GROUP and not grouped:
            raise self._refused(f"the pattern needs a group named {name}", text.pattern, (*at, "text"))
        return Source(value)

    def _rules(self, data: dict[str, Any], key: str) -> Iterable[tuple[Any, yaml_source.Loc]]:
        rules = data.get(key, [])
        if not isinstance(rules, list):
            raise self._refused("this must be a list of rules", type(rules).__name__, (key,))
        return [(rule, (key, number)) for number, rule in enumerate(rules)]

    def _mapping(self, value: Any, at: yaml_source.Loc, keys: Iterable[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refused("this must be a mapping", type(value).__name__, at)
        for key in value:
            if key not in keys:
                raise self._refused("there is no such key", f"{key!r}, of {', '.join(keys)}", (*at, key))
        return value

    def _kind(self, value: Any, at: yaml_source.Loc) -> Kind:
        kind = by_name(value) if isinstance(value, str) else None
        if kind is None:
            why = f"{value!r:.80}; `eplbctl protocol show` lists the calls"
            raise self._refused("there is no such call", why, at)
        return kind

    def _numbered(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        pattern = self._pattern(value, at)
        if not pattern.groups:
            raise self._refused("the pattern needs a group that is the number", pattern.pattern, at)
        return pattern

    def _pattern(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise self._refused("this must be a pattern", f"{value!r:.80}", at)
        try:
            return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused("this is no regular expression", f"{value!r:.80}: {error}", at) from error

    def _refused(self, what: str, why: str, at: yaml_source.Loc) -> TraceError:
        return TraceError("E070", f"a table of calls: {what}", why=why, where=self._document.where(at))
