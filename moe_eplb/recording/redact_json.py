"""Redaction of Chrome JSON, as the torch profiler (Kineto) writes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from moe_eplb.recording.nvtx_ranges import DOMAIN
from moe_eplb.recording.redact_names import names_someone, sensitive
from moe_eplb.recording.redact_text import REMOVED, Scrubber, is_secret_option

__all__ = ["redact_json", "scrubbed_text"]

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events whose names are those of kernels and copies."""
_NUMBER = "\ue000number:"
_QUOTED_NUMBER = re.compile(rf'"{_NUMBER}([^"]*)"')
_STAND_IN = re.compile(r"\(removed\)|\(uuid \d+\)")


class _Digits(str):
    """A number with a fraction as it was written, marked so that it is told from a text when it is written again."""


def redact_json(text: str, scrubber: Scrubber) -> tuple[str, list[str]]:
    """The same document without what must not leave the machine, and what was removed.

    Numbers keep their digits: a time in microseconds since 1970 has more of them than a float keeps.

    Raises:
        ValueError: it is no JSON.
    """
    document = json.loads(text, parse_float=lambda digits: _Digits(_NUMBER + digits))
    for string in _strings(document):
        if _NUMBER in string:
            raise ValueError(f"it holds the text {_NUMBER!r}, which redaction uses itself")
        scrubber.learn_homes(string)
    scrubber.learn(_names(document))
    walk = _Walk(scrubber)
    redacted = json.dumps(walk.value(document, "document"), ensure_ascii=False, separators=(",", ":"))
    removed = [f"{place}: {count} texts" for place, count in sorted(walk.removed.items()) if count]
    return _QUOTED_NUMBER.sub(r"\1", redacted), removed


def scrubbed_text(text: str, scrubber: Scrubber) -> str:
    """The text without what must not stay; one that is JSON itself loses what its keys forbid, too."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            redacted, removed = redact_json(text, scrubber)
        except json.JSONDecodeError:
            pass  # it begins like JSON and is none
        else:
            return redacted if removed else text
    return scrubber.text(text)


class _Walk:
    """Goes through a document and counts what it has removed, by key."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber
        self.removed: Counter[str] = Counter()

    def value(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return self._object(value)
        if isinstance(value, list):
            return self._list(value, place)
        return self._text(value, place) if isinstance(value, str) and not isinstance(value, _Digits) else value

    def _list(self, items: list[Any], place: str) -> list[Any]:
        announced = [False, *(isinstance(item, str) and is_secret_option(item) for item in items)]
        return [
            self._removed(item, place) if secret and isinstance(item, str) else self.value(item, place)
            for item, secret in zip(items, announced, strict=False)
        ]

    def _object(self, entries: dict[str, Any]) -> dict[str, Any]:
        kept = "name" if _is_protected(entries) else None
        label = entries.get("ph") == "M" and entries.get("name") in ("process_name", "process_labels")
        property_name = entries.get("name", entries.get("key"))
        result: dict[str, Any] = {}
        for key, value in entries.items():
            shown = self._text(key, "keys")
            named = property_name if key == "value" and isinstance(property_name, str) else key
            if sensitive(named) and sensitive(named, number=not _holds_text(value)):
                new = self._removed(value, shown)
            elif key == "args" and label and isinstance(value, dict):
                new = {self._text(name, "keys"): self._process(text) for name, text in value.items()}
            else:
                new = value if key == kept else self.value(value, shown)
            result[_free(shown, result)] = new
        return result

    def _removed(self, value: Any, key: str) -> Any:
        if value in ("", None, [], {}) or (isinstance(value, str) and _STAND_IN.fullmatch(value)):
            return value
        self.removed[key] += 1
        return self._scrubber.field(value) if isinstance(value, str) else REMOVED

    def _process(self, text: Any) -> Any:
        """A process is named by its program alone: what stands behind it are its arguments."""
        if not isinstance(text, str):
            return text
        program, _, arguments = text.partition(" ")
        self.removed["process arguments"] += bool(arguments)
        return self._text(program, "process_name")

    def _text(self, text: str, place: str) -> str:
        scrubbed = scrubbed_text(text, self._scrubber)
        self.removed[place] += scrubbed != text
        return scrubbed


def _free(key: str, taken: dict[str, Any]) -> str:
    """Keys that have become the same text are numbered, so that none takes the place of another."""
    number, free = 1, key
    while free in taken:
        number += 1
        free = f"{key} {number}"
    return free


def _is_protected(event: dict[str, Any]) -> bool:
    arguments = event.get("args")
    domain = arguments.get("domain") if isinstance(arguments, dict) else None
    return event.get("cat") in _DEVICE_WORK or domain == DOMAIN


def _holds_text(value: Any) -> bool:
    """Whether there is a letter in it, beside keys."""
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    if isinstance(value, list):
        return any(map(_holds_text, value))
    return isinstance(value, str) and not isinstance(value, _Digits) and any(map(str.isalpha, value))


def _strings(value: Any) -> Iterator[str]:
    """Every text of a document, keys as well."""
    if isinstance(value, str):
        if not isinstance(value, _Digits):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)


def _names(value: Any) -> Iterator[str]:
    """Users and machines that the document itself names."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if names_someone(key):
                yield from (name for name in (item if isinstance(item, list) else [item]) if isinstance(name, str))
            if isinstance(item, dict | list):
                yield from _names(item)
