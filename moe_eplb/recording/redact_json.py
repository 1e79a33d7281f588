"""Redaction of Chrome JSON, as the torch profiler (Kineto) writes it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from moe_eplb.recording.nvtx_ranges import DOMAIN
from moe_eplb.recording.redact_text import REMOVED, Scrubber, sensitive

__all__ = ["redact_json"]

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events whose names are those of kernels and copies."""
_NUMBER = "\ue000number:"
_QUOTED_NUMBER = re.compile(rf'"{_NUMBER}([^"]*)"')
_STAND_IN = re.compile(r"\(removed\)|\(uuid \d+\)")


def redact_json(text: str, scrubber: Scrubber) -> tuple[str, list[str]]:
    """The same document without what must not leave the machine, and what was removed.

    Numbers keep their digits: a time in microseconds since 1970 has more of them than a float keeps.

    Raises:
        ValueError: it is no JSON.
    """
    if _NUMBER in text:
        raise ValueError(f"it holds the text {_NUMBER!r}, which redaction uses itself")
    document = json.loads(text, parse_float=lambda digits: _NUMBER + digits)
    scrubber.learn(_names(document))
    scrubber.learn_homes(text)
    walk = _Walk(scrubber)
    redacted = json.dumps(walk.value(document, "document"), ensure_ascii=False, separators=(",", ":"))
    removed = [f"{place}: {count} texts" for place, count in sorted(walk.removed.items()) if count]
    return _QUOTED_NUMBER.sub(r"\1", redacted), removed


class _Walk:
    """Goes through a document and counts what it has removed, by key."""

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber = scrubber
        self.removed: Counter[str] = Counter()

    def value(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return self._object(value)
        if isinstance(value, list):
            return [self.value(item, place) for item in value]
        return self._text(value, place) if isinstance(value, str) and not value.startswith(_NUMBER) else value

    def _object(self, entries: dict[str, Any]) -> dict[str, Any]:
        kept = "name" if _is_protected(entries) else None
        label = entries.get("ph") == "M" and entries.get("name") in ("process_name", "process_labels")
        result = {}
        for key, value in entries.items():
            if sensitive(key):
                result[key] = self._removed(value, key)
            elif key == "args" and label:
                result[key] = {name: self._process(text) for name, text in value.items()}
            else:
                result[self._text(key, "keys")] = value if key == kept else self.value(value, key)
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
        scrubbed = self._scrubber.text(text)
        self.removed[place] += scrubbed != text
        return scrubbed


def _is_protected(event: dict[str, Any]) -> bool:
    arguments = event.get("args")
    domain = arguments.get("domain") if isinstance(arguments, dict) else None
    return event.get("cat") in _DEVICE_WORK or domain == DOMAIN


def _names(value: Any) -> list[str]:
    """Users and machines that the document itself names."""
    if isinstance(value, list):
        return [name for item in value for name in _names(item)]
    if not isinstance(value, dict):
        return []
    own = [v for k, v in value.items() if isinstance(v, str) and re.search("host|user_?name|^user$", k, re.IGNORECASE)]
    return own + [name for item in value.values() if isinstance(item, dict | list) for name in _names(item)]
