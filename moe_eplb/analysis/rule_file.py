"""Turns plain data into rules of patterns; what it does not know is refused, since a rule that is ignored misleads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from moe_eplb.core.errors import TraceError

if TYPE_CHECKING:
    from moe_eplb.core import yaml_source

__all__ = ["RuleDocument", "RuleParser"]

_LONGEST = 1000


class RuleDocument(Protocol):
    """Plain data, and where in its source each part stands."""

    @property
    def data(self) -> Any: ...

    def where(self, loc: yaml_source.Loc) -> str: ...


class RuleParser:
    """What tables of rules have in common.

    Attributes:
        code, table: Code of an error, and what it calls the table.
    """

    code: ClassVar[str]
    table: ClassVar[str]

    def __init__(self, document: RuleDocument) -> None:
        self.document = document

    def rules(self, data: dict[str, Any], key: str) -> Iterable[tuple[Any, yaml_source.Loc]]:
        """The rules under a key, each with its place."""
        rules = data.get(key, [])
        if not isinstance(rules, list):
            raise self.refused("this must be a list of rules", type(rules).__name__, (key,))
        return [(rule, (key, number)) for number, rule in enumerate(rules)]

    def mapping(self, value: Any, at: yaml_source.Loc, keys: Iterable[str]) -> dict[str, Any]:
        """A mapping that has none but these keys."""
        if not isinstance(value, dict):
            raise self.refused("this must be a mapping", type(value).__name__, at)
        for key in value:
            if key not in keys:
                raise self.refused("there is no such key", f"{key!r}, of {', '.join(keys)}", (*at, key))
        return value

    def numbered(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        """A pattern with a group."""
        pattern = self.pattern(value, at)
        if not pattern.groups:
            raise self.refused("the pattern needs a group that is the number", pattern.pattern, at)
        return pattern

    def pattern(self, value: Any, at: yaml_source.Loc) -> re.Pattern[str]:
        """A regular expression of a bounded length."""
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise self.refused("this must be a pattern", f"{value!r:.80}", at)
        try:
            return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.refused("this is no regular expression", f"{value!r:.80}: {error}", at) from error

    def refused(self, what: str, why: str, at: yaml_source.Loc) -> TraceError:
        """The error of what is wrong at a place."""
        return TraceError(self.code, f"{self.table}: {what}", why=why, where=self.document.where(at))
