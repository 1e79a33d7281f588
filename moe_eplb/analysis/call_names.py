"""The table that says which host ranges are calls of the balancer, as YAML: ours, one for TensorRT-LLM, and users'."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moe_eplb.analysis.rule_file import RuleParser
from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError, TraceError
from moe_eplb.core.events import Kind, by_name

__all__ = ["SHIPPED", "CallNames", "CallRule", "KernelRule", "Source", "load_call_names"]

_BUILT_IN = "call_names.yaml"
SHIPPED = {"tensorrt_llm": "call_names_tensorrt_llm.yaml"}
"""Tables that come along and are asked for by name."""
_KIND, _ITERATION = "kind", "iteration"


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


class _Parser(RuleParser):
    code, table = "E070", "a table of calls"

    def names(self) -> CallNames:
        data = self.mapping(self.document.data, (), CallNames.__dataclass_fields__)
        return CallNames(
            calls=tuple(self._call(rule, at) for rule, at in self.rules(data, "calls")),
            kernels=tuple(self._kernel(rule, at) for rule, at in self.rules(data, "kernels")),
            iterations=tuple(self.numbered(rule, at) for rule, at in self.rules(data, "iterations")),
            layers=tuple(self.numbered(rule, at) for rule, at in self.rules(data, "layers")),
        )

    def _call(self, rule: Any, at: yaml_source.Loc) -> CallRule:
        rule = self.mapping(rule, at, ("domain", "text", "call", "layer", "iteration"))
        domain = self.pattern(rule.get("domain", ""), (*at, "domain"))
        text = self.pattern(rule.get("text"), (*at, "text"))
        call = rule.get("call")
        layer, iteration = (self._source(rule, name, text, at) for name in ("layer", "iteration"))
        if layer is iteration is Source.PAYLOAD:
            raise self.refused("layer and iteration cannot both be the payload", "it is one number", at)
        if call == _ITERATION:
            return CallRule(domain, text, Kind.START_ITER, layer, iteration, whole=True)
        if call == _KIND and "call" not in text.groupindex:
            raise self.refused("the pattern needs a group named call", text.pattern, (*at, "text"))
        return CallRule(domain, text, None if call == _KIND else self._kind(call, (*at, "call")), layer, iteration)

    def _kernel(self, rule: Any, at: yaml_source.Loc) -> KernelRule:
        rule = self.mapping(rule, at, ("name", "kind"))
        return KernelRule(self.pattern(rule.get("name"), (*at, "name")), self._kind(rule.get("kind"), (*at, "kind")))

    def _source(self, rule: dict[str, Any], name: str, text: re.Pattern[str], at: yaml_source.Loc) -> Source:
        """By default the group, if the pattern has it, else a range around the call."""
        grouped = name in text.groupindex
        value = rule.get(name, Source.GROUP if grouped else Source.ENCLOSING)
        if value not in list(Source):
            raise self.refused("there is no such place of a number", f"{value!r}, of {', '.join(Source)}", (*at, name))
        if value == Source.GROUP and not grouped:
            raise self.refused(f"the pattern needs a group named {name}", text.pattern, (*at, "text"))
        return Source(value)

    def _kind(self, value: Any, at: yaml_source.Loc) -> Kind:
        kind = by_name(value) if isinstance(value, str) else None
        if kind is None:
            why = f"{value!r:.80}; `eplbctl protocol show` lists the calls"
            raise self.refused("there is no such call", why, at)
        return kind
