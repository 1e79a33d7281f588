"""YAML text to plain data that remembers where every value stands in its file.

Scalars follow the YAML 1.2 core schema: only ``true`` and ``false`` are booleans, so ``on``, ``yes`` and a date stay
text. Duplicate keys, tags, several documents and keys that are neither text nor whole numbers are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.input_file import read_input

__all__ = ["Document", "Loc", "dump", "load", "load_shipped", "read_text"]

Loc: TypeAlias = tuple[str | int, ...]  # the way to a value: keys of mappings and indices of lists

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000  # also after aliases are expanded, which is what bounds a "billion laughs" file

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_NULL = re.compile(r"~|null|Null|NULL|")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and the place of each value."""

    data: Any
    name: str
    keys: dict[Loc, str] = field(default_factory=dict)
    values: dict[Loc, str] = field(default_factory=dict)

    def where(self, loc: Loc, *, key: bool = False) -> str:
        """``file:line:col`` of the value at `loc`, or of its key; steps that the file does not have are left out."""
        path: Loc = ()
        for step in loc:
            if (*path, step) in self.values:
                path = (*path, step)
        place = self.values.get(path, self.name)
        return self.keys.get(path, place) if key else place


class _Loader(yaml.SafeLoader):
    """Composes nodes only; PyYAML's own YAML 1.1 resolvers and constructors are not used."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.depth += 1
        self.nodes += 1
        if self.nodes > MAX_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_VALUES} values", mark)
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that `load` would otherwise read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(f"(?:{_pattern.pattern})$"), None)


def load(text: str, name: str) -> Document:
    """Parse one YAML document.

    Args:
        text: The file's text.
        name: What to call the file in places and errors.

    Raises:
        ScenarioError: E021 no YAML, E022 a key twice, E023 too deep or too large, E024 a value of a kind that is not
            allowed, E025 nothing in it.
    """
    node = _compose(text, name)
    if node is None:
        raise ScenarioError("E025", "the file is empty", where=name, hint="it must hold one mapping of keys to values")
    document = Document(None, name)
    data = _Builder(document).build(node, (), 0)
    return Document(data, name, document.keys, document.values)


def load_shipped(text: str, name: str) -> Document:
    """The same for a file that comes with this package, ten times as fast: by libyaml if there is one, without places.

    A test holds the two against each other on every such file.
    """
    return Document(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), name)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file of bounded size; E020 when there is none."""
    try:
        # Windows' editors begin a file with a byte order mark and end lines with two characters; neither is content.
        return read_input(path, MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ScenarioError("E020", "the file is not UTF-8 text", why=str(error), where=str(path)) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ScenarioError("E020", "the file cannot be read", why=why, where=str(path)) from error


def dump(data: Any) -> str:
    """YAML text of plain data that `load` reads back equal; innermost collections are written in one line."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)
    return text


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        why = f"character {ord(text[error.position]):#x} is not allowed in YAML"
        raise ScenarioError("E021", "this is not YAML", why=why, where=f"{name}:{line}:{column}") from error
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name) from error
    return node


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> ScenarioError:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = str(error.problem or error.context)
    for limit, what in (("nested more", "the file is nested too deeply"), ("more than", "the file is too large")):
        if problem.startswith(limit):
            return ScenarioError("E023", what, why=problem, where=where)
    hint = "indent with spaces; YAML does not allow tabs" if "\\t" in problem else ""
    if "document" in problem or "document" in str(error.context):
        hint = "one file holds one document; remove the line '---'"
    return ScenarioError("E021", "this is not YAML", why=problem, hint=hint, where=where)


class _Builder:
    """Turns nodes into data and notes their places."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._count = 0

    def build(self, node: yaml.Node, loc: Loc, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            why = f"more than {MAX_VALUES} values or {MAX_DEPTH} levels once its aliases are expanded"
            raise ScenarioError("E023", "the file is too large", why=why, where=self._place(node))
        self._document.values[loc] = self._place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc, depth)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.build(child, (*loc, i), depth + 1) for i, child in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, loc: Loc, depth: int) -> dict[str | int, Any]:
        self._check_tag(node, "map")
        data: dict[str | int, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in data:
                first = self._document.keys[*loc, key]
                why = f"it stands first at {first}"
                raise ScenarioError("E022", f"the key {key!r} is given twice", why=why, where=self._place(key_node))
            self._document.keys[*loc, key] = self._place(key_node)
            data[key] = self.build(value_node, (*loc, key), depth + 1)
        return data

    def _key(self, node: yaml.Node) -> str | int:
        key = self._scalar(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            hint = "quote it to make it text"
            raise ScenarioError("E024", "a key must be text or a whole number", hint=hint, where=self._place(node))
        return key

    def _scalar(self, node: yaml.Node) -> str | int | float | bool | None:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if _SURROGATE.search(text):
            why = "an escape stands for half a character, a lone surrogate"
            raise ScenarioError("E024", "this value is no text", why=why, where=self._place(node))
        if kind == "str":
            return text
        if kind == "null" and _NULL.fullmatch(text):
            return None
        if kind == "bool" and _BOOL.fullmatch(text):
            return text.lower() == "true"
        if kind == "int" and _INT.fullmatch(text) and len(text) <= 100:
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        if kind == "float" and _FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        why = f"{node.tag} on {text[:40]!r}"
        hint = "write plain text, numbers, true or false; quote text that looks like something else"
        raise ScenarioError("E024", "this value is not allowed", why=why, hint=hint, where=self._place(node))

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise ScenarioError("E024", "tags are not allowed", why=node.tag, where=self._place(node))

    def _place(self, node: yaml.Node) -> str:
        mark = node.start_mark
        return f"{self._document.name}:{mark.line + 1}:{mark.column + 1}"
