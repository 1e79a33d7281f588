"""Names from a trace, made harmless for people's eyes: what is not printable is spelled out, what is long is cut."""

from __future__ import annotations

__all__ = ["MOST_CHARACTERS", "inert"]

MOST_CHARACTERS = 400


def inert(text: str, most: int = MOST_CHARACTERS, keep: str = "") -> str:
    """Text in which control characters, marks that turn the direction of writing and lone surrogates are visible.

    It is not escaped for any format.

    Args:
        most: Characters of the text beyond which it is cut; how many it had is then said.
        keep: Characters that stay as they are, such as line breaks.
    """
    shown = text[:most]
    if not shown.isprintable():
        shown = "".join(one if one.isprintable() or one in keep else _spelled(one) for one in shown)
    return shown if len(text) <= most else f"{shown}… ({len(text)} characters)"


def _spelled(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
