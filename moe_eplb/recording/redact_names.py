"""Which names of keys, columns, properties and options tell that their values must not leave the machine."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["is_secret", "names_someone", "sensitive"]

_SENSITIVE = frozenset(
    (
        *("argv", "arguments", "cmd", "cmdline", "command", "commandline", "cwd", "directory", "env", "environ"),
        *("environment", "exe", "file", "filename", "fqdn", "guid", "host", "hostname", "ip", "login", "mac"),
        *("machine", "node", "nodename", "path", "pwd", "serial", "user", "username", "uuid", "workdir"),
    )
)
"""A column, key or property with one of these words, or its plural, in its name never keeps its value."""

_SECRETS = frozenset(
    (
        *("apikey", "auth", "authentication", "authorization", "bearer", "cookie", "credential", "passphrase"),
        *("passwd", "password", "pwd", "secret", "token"),
    )
)
_KINDS_OF_KEYS = frozenset(("access", "api", "encryption", "private", "secret", "signing", "ssh"))
_COUNTED = frozenset(("token", "node"))
"""Words under which a number is a count or a place: tokens of a step, nodes of a graph."""
_SHOWN_NAME = {"display", "name"}
"""Both together: under a display name stands the machine's."""
_NO_PLURALS = frozenset(("macs",))
"""What looks like a plural of the above and means something else: multiplications."""
_NAMES = frozenset(("fqdn", "login", "nodename", "username"))
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


@lru_cache(maxsize=1 << 12)
def sensitive(name: str, *, number: bool = False) -> bool:
    """Whether a key such as ``PROCESS_0:USER_NAME``, ``hostName`` or ``gpu_uuid`` names what must not stay.

    Args:
        name: Words in any spelling.
        number: The value is a number or holds nothing but numbers; then a plural, a token and a node are counts.
    """
    words = _words(name, number=number)
    return not _SENSITIVE.isdisjoint(words) or words >= _SHOWN_NAME or _secret(words)


def is_secret(name: str, *, number: bool = False) -> bool:
    """Whether what stands under this name opens something: a token, a password, a private key."""
    return _secret(_words(name, number=number))


@lru_cache(maxsize=1 << 12)
def names_someone(name: str) -> bool:
    """Whether the value is a user or a machine, so that the same name is to go wherever else it stands."""
    words = _words(name, number=False)
    pairs = ({"user", "name"}, {"node", "name"}, _SHOWN_NAME)
    return (
        "host" in name.lower()
        or not _NAMES.isdisjoint(words)
        or any(words >= pair for pair in pairs)
        or words - {"users", "export"} == {"user"}
    )


def _secret(words: set[str]) -> bool:
    return not _SECRETS.isdisjoint(words) or ("key" in words and not _KINDS_OF_KEYS.isdisjoint(words))


def _words(name: str, *, number: bool) -> set[str]:
    words = {word.lower() for word in _WORDS.findall(name)}
    if number:
        return words - _COUNTED
    return words | {word.removesuffix("s") for word in words - _NO_PLURALS}
