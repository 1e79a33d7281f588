"""The table that says what GPU time is, as YAML: the built-in one, and tables of the user's that are asked first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moe_eplb.core.errors import ScenarioError, TraceError
from moe_eplb.core.events import Role

if TYPE_CHECKING:
    from moe_eplb.core import yaml_source

__all__ = ["DomainRule", "NameRule", "RoleTable", "StreamRule", "load_role_table", "role_table_of"]

_BUILT_IN = "role_table.yaml"
_KIND = "kind"
"""Stands for the role of our own kind of record that a range is named after."""
_LONGEST = 1000


@dataclass(frozen=True, slots=True)
class NameRule:
    """A role by a pattern of the event's name."""

    name: re.Pattern[str]
    role: Role


@dataclass(frozen=True, slots=True)
class DomainRule:
    """A role by patterns of the range around the launch; None takes it from our kind of that name."""

    domain: re.Pattern[str]
    text: re.Pattern[str]
    role: Role | None


@dataclass(frozen=True, slots=True)
class StreamRule:
    """What roles by name become on streams whose declared name matches."""

    name: re.Pattern[str]
    roles: dict[Role, Role]


@dataclass(frozen=True)
class RoleTable:
    """All rules, in the order in which they are asked."""

    domains: tuple[DomainRule, ...] = ()
    streams: tuple[StreamRule, ...] = ()
    kernels: tuple[NameRule, ...] = ()
    iterations: tuple[re.Pattern[str], ...] = ()
    layers: tuple[re.Pattern[str], ...] = ()

    def before(self, other: RoleTable) -> RoleTable:
        """Both tables, this one's rules first."""
        return RoleTable(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def by_name(self, name: str) -> Role:
        """The role of a GPU event by its name alone."""
        return next((rule.role for rule in self.kernels if rule.name.search(name)), Role.UNKNOWN)


def load_role_table(paths: Sequence[Path] = ()) -> RoleTable:
    """The built-in table behind those of the user's, the first of which is asked first.

    Raises:
        TraceError: E067 a table is not acceptable.
    """
    table = _built_in()
    for path in reversed(paths):
        from moe_eplb.core import yaml_source

        try:
            own = yaml_source.load(yaml_source.read_text(path), str(path))
        except ScenarioError as error:
            raise TraceError("E067", "a table of roles cannot be read", why=str(error), where=str(path)) from error
        table = _Parser(own).table().before(table)
    return table


def role_table_of(data: Any, name: str) -> RoleTable:
    """A table from plain data, such as JSON holds; it stands alone, and needs no library that reads YAML.

    Raises:
        TraceError: E067 it is not acceptable.
    """
    return _Parser(_Plain(data, name)).table()


@cache
def _built_in() -> RoleTable:
    from moe_eplb.core import yaml_source  # here, so that this module serves where no library reads YAML

    text = resources.files("moe_eplb.analysis").joinpath(_BUILT_IN).read_text(encoding="utf-8")
    return _Parser(yaml_source.load_shipped(text, _BUILT_IN)).table()


class _Document(Protocol):
    """Plain data, and where in its source each part stands."""

    @property
    def data(self) -> Any: ...

    def where(self, loc: yaml_source.Loc) -> str: ...


@dataclass(frozen=True, slots=True)
class _Plain:
    """Plain data whose parts are placed by their keys."""

    data: Any
    name: str

    def where(self, loc: yaml_source.Loc) -> str:
        return ":".join([self.name, *map(str, loc)])


class _Parser:
    """Turns plain data into rules; what it does not know is refused, since a rule that is ignored misleads."""

    def __init__(self, document: _Document) -> None:
        self._document = document

    def table(self) -> RoleTable:
        data = self._mapping(self._document.data, (), RoleTable.__dataclass_fields__)
        return RoleTable(
            domains=tuple(self._domain(rule, at) for rule, at in self._rules(data, "domains")),
            streams=tuple(self._stream(rule, at) for rule, at in self._rules(data, "streams")),
            kernels=tuple(self._kernel(rule, at) for rule, at in self._rules(data, "kernels")),
            iterations=tuple(self._pattern(rule, at) for rule, at in self._rules(data, "iterations")),
            layers=tuple(self._numbered(rule, at) for rule, at in self._rules(data, "layers")),
        )

    def _domain(self, rule: Any, at: yaml_source.Loc) -> DomainRule:
        rule = self._mapping(rule, at, ("domain", "text", "role"))
        role = None if rule.get("role") == _KIND else self._role(rule.get("role"), (*at, "role"))
        text = self._pattern(rule.get("text", ""), (*at, "text"))
        return DomainRule(self._pattern(rule.get("domain"), (*at, "domain")), text, role)

    def _stream(self, rule: Any, at: yaml_source.Loc) -> StreamRule:
        rule = self._mapping(rule, at, ("name", "roles"))
        roles = self._mapping(rule.get("roles"), (*at, "roles"), [role.value for role in Role])
        named = {Role(key): self._role(value, (*at, "roles", key)) for key, value in roles.items()}
        return StreamRule(self._pattern(rule.get("name"), (*at, "name")), named)

    def _kernel(self, rule: Any, at: yaml_source.Loc) -> NameRule:
        rule = self._mapping(rule, at, ("name", "role"))
        return NameRule(self._pattern(rule.get("name"), (*at, "name")), self._role(rule.get("role"), (*at, "role")))

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

    def _role(self, value: Any, at: yaml_source.Loc) -> Role:
        try:
            return Role(value)
        except ValueError as error:
            why = f"{value!r}, of {', '.join(Role)}"
            raise self._refused("there is no such role", why, at) from error

    def _numbered(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        pattern = self._pattern(value, at)
        if not pattern.groups:
            raise self._refused("the pattern of a layer needs a group that is its number", pattern.pattern, at)
        return pattern

    def _pattern(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise self._refused("this must be a pattern", f"{value!r:.80}", at)
        try:
            return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refused("this is no regular expression", f"{value!r:.80}: {error}", at) from error

    def _refused(self, what: str, why: str, at: yaml_source.Loc) -> TraceError:
        return TraceError("E067", f"a table of roles: {what}", why=why, where=self._document.where(at))
