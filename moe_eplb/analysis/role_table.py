"""The table that says what GPU time is, as YAML: the built-in one, and tables of the user's that are asked first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_eplb.analysis.rule_file import RuleParser
from moe_eplb.core.errors import ScenarioError, TraceError
from moe_eplb.core.events import Role

if TYPE_CHECKING:
    from moe_eplb.core import yaml_source

__all__ = ["DomainRule", "NameRule", "RoleTable", "StreamRule", "load_role_table", "role_table_of"]

_BUILT_IN = "role_table.yaml"
_KIND = "kind"
"""Stands for the role of our own kind of record that a range is named after."""


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
        table = _Parser(own).parsed().before(table)
    return table


def role_table_of(data: Any, name: str) -> RoleTable:
    """A table from plain data, such as JSON holds; it stands alone, and needs no library that reads YAML.

    Raises:
        TraceError: E067 it is not acceptable.
    """
    return _Parser(_Plain(data, name)).parsed()


@cache
def _built_in() -> RoleTable:
    from moe_eplb.core import yaml_source  # here, so that this module serves where no library reads YAML

    text = resources.files("moe_eplb.analysis").joinpath(_BUILT_IN).read_text(encoding="utf-8")
    return _Parser(yaml_source.load_shipped(text, _BUILT_IN)).parsed()


@dataclass(frozen=True, slots=True)
class _Plain:
    """Plain data whose parts are placed by their keys."""

    data: Any
    name: str

    def where(self, loc: yaml_source.Loc) -> str:
        return ":".join([self.name, *map(str, loc)])


class _Parser(RuleParser):
    code, table = "E067", "a table of roles"

    def parsed(self) -> RoleTable:
        data = self.mapping(self.document.data, (), RoleTable.__dataclass_fields__)
        return RoleTable(
            domains=tuple(self._domain(rule, at) for rule, at in self.rules(data, "domains")),
            streams=tuple(self._stream(rule, at) for rule, at in self.rules(data, "streams")),
            kernels=tuple(self._kernel(rule, at) for rule, at in self.rules(data, "kernels")),
            iterations=tuple(self.pattern(rule, at) for rule, at in self.rules(data, "iterations")),
            layers=tuple(self.numbered(rule, at) for rule, at in self.rules(data, "layers")),
        )

    def _domain(self, rule: Any, at: yaml_source.Loc) -> DomainRule:
        rule = self.mapping(rule, at, ("domain", "text", "role"))
        role = None if rule.get("role") == _KIND else self._role(rule.get("role"), (*at, "role"))
        text = self.pattern(rule.get("text", ""), (*at, "text"))
        return DomainRule(self.pattern(rule.get("domain"), (*at, "domain")), text, role)

    def _stream(self, rule: Any, at: yaml_source.Loc) -> StreamRule:
        rule = self.mapping(rule, at, ("name", "roles"))
        roles = self.mapping(rule.get("roles"), (*at, "roles"), [role.value for role in Role])
        named = {Role(key): self._role(value, (*at, "roles", key)) for key, value in roles.items()}
        return StreamRule(self.pattern(rule.get("name"), (*at, "name")), named)

    def _kernel(self, rule: Any, at: yaml_source.Loc) -> NameRule:
        rule = self.mapping(rule, at, ("name", "role"))
        return NameRule(self.pattern(rule.get("name"), (*at, "name")), self._role(rule.get("role"), (*at, "role")))

    def _role(self, value: Any, at: yaml_source.Loc) -> Role:
        try:
            return Role(value)
        except ValueError as error:
            why = f"{value!r}, of {', '.join(Role)}"
            raise self.refused("there is no such role", why, at) from error
