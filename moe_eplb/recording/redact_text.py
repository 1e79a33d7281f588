"""What in a text tells of a person, a machine or its environment, and how it is taken out."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

__all__ = ["REMOVED", "SENSITIVE_KEYS", "Scrubber", "local_scrubber", "sensitive"]

REMOVED = "(removed)"
"""What stands where something was taken out."""

SENSITIVE_KEYS = frozenset(
    (
        *("argv", "arguments", "cmdline", "command", "commandline", "cwd", "directory", "env", "environ"),
        *("environment", "file", "filename", "guid", "host", "hostname", "login", "mac", "machine", "path", "pwd"),
        *("serial", "user", "username", "uuid", "workdir"),
    )
)
"""A column, key or property with one of these words in its name never keeps its value."""

_SHOWN_NAME = {"display", "name"}
"""Both together: under a display name stands the machine's."""

_PRIVATE_ROOTS = (
    *("home", "root", "Users", "work", "workspace", "workspaces", "mnt", "scratch", "data", "tmp", "var/tmp"),
    *("opt", "var/lib", "run/user", "gpfs", "lustre", "nfs", "srv", "project", "projects", "fsx", "efs", "private"),
)
_COMMON_NAMES = frozenset(
    ("root", "user", "users", "localhost", "local", "admin", "python", "linux", "ubuntu", "debian")
)
"""Names of users and machines that say nothing, and that other texts hold in another meaning."""
_SHORTEST_NAME = 4
_SHORTEST_SECRET = 8
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_HOME = re.compile(r"/(?:home|Users)/([A-Za-z0-9_.-]+)")

_ASSIGNMENT = re.compile(r"(?<![\w.-])([A-Z][A-Z0-9_]{2,}|[a-z]+_proxy)=(?!\(removed\)).*?(?=[\s\0;]+\w+=|[\n\0]|$)")
_OPTION = re.compile(r"(--?[\w-]*(?:token|key|secret|passw|credential)[\w-]*[= ])(?!\(removed\))\S+", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SERIAL = re.compile(r"(serial(?: ?(?:number|no\.?))?\s*[:=]\s*)(?!\(removed\))\S+", re.IGNORECASE)
_UUID = re.compile(
    r"\b(?:(?:GPU|MIG|NIC)-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.IGNORECASE
)
_MAC = re.compile(r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5,19}\b|\b[0-9a-f]{4}(?::[0-9a-f]{4}){3}\b", re.IGNORECASE)
_ADDRESS = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")


def sensitive(name: str) -> bool:
    """Whether a key such as ``PROCESS_0:USER_NAME``, ``hostName`` or ``gpu_uuid`` names what must not stay."""
    words = {word.lower() for word in _WORDS.findall(name)}
    return not SENSITIVE_KEYS.isdisjoint(words) or words >= _SHOWN_NAME


class Scrubber:
    """Takes environment assignments, secrets, UUIDs, addresses, names and private paths out of texts.

    Args:
        folders: Absolute paths that must not be read from a text, besides the usual homes and work folders.
        names: Users and machines; those shorter than four letters are taken out of named fields only.
        environment: Its values whose names tell of a secret are taken out wherever they stand.
    """

    def __init__(
        self, folders: Iterable[str] = (), names: Iterable[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._folders = {folder.rstrip("/") for folder in folders} - {""}
        self._names = set(names)
        self._secrets = [
            value
            for name, value in (environment or {}).items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
        ]
        self._uuids: dict[str, str] = {}
        self._compile()

    def learn(self, names: Iterable[str]) -> None:
        """Take these names of users and machines out as well, from now on."""
        self._names |= {name for name in names if name != REMOVED}
        self._compile()

    def learn_homes(self, text: str) -> None:
        """Take the owners of the home folders in a text for users."""
        self.learn(_HOME.findall(text))

    def text(self, value: str) -> str:
        """The text without what must not stay; a text that holds nothing of it comes back as it is."""
        return self._scrub(value)

    def field(self, value: str) -> str:
        """What stands for a value that must not stay: the same for the same UUID, so that joins hold."""
        return self._pseudonym(value) if _UUID.fullmatch(value) else REMOVED

    def _compile(self) -> None:
        roots = [re.escape(f"/{root}") for root in _PRIVATE_ROOTS]
        roots += [re.escape(folder) for folder in sorted(self._folders, key=len, reverse=True)]
        self._path = re.compile(rf"(?<![\w)./-])(?:{'|'.join(roots)})(?=/|$|[^\w./-])(?:/[^\s/:;,'\"<>()|\0]*)*")
        long = [n for n in self._names if len(n) >= _SHORTEST_NAME and n.lower() not in _COMMON_NAMES]
        words = "|".join(re.escape(name) for name in sorted(long, key=len, reverse=True))
        self._name = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if words else None
        self._scrub = lru_cache(maxsize=1 << 16)(self._uncached)

    def _uncached(self, value: str) -> str:
        for secret in self._secrets:
            value = value.replace(secret, REMOVED)
        value = _ASSIGNMENT.sub(rf"\1={REMOVED}", value)
        value = _OPTION.sub(rf"\1{REMOVED}", value)
        value = _SERIAL.sub(rf"\1{REMOVED}", value)
        value = _LOGIN.sub(REMOVED, value)
        value = _UUID.sub(lambda match: self._pseudonym(match[0]), value)
        value = _ADDRESS.sub(REMOVED, _MAC.sub(REMOVED, value))
        value = self._path.sub(self._shortened, value)
        return self._name.sub(REMOVED, value) if self._name else value

    def _shortened(self, match: re.Match[str]) -> str:
        """A file keeps its own name: which module a range comes from says nothing of where it was installed."""
        path = match[0]
        folder, _, last = path.rstrip("/").rpartition("/")
        bare = path.rstrip("/") in self._folders or folder.count("/") < 2 or "." not in last.strip(".")
        return REMOVED if bare else f"{REMOVED}/{last}"

    def _pseudonym(self, uuid: str) -> str:
        bare = uuid.lower()[-36:]
        return self._uuids.setdefault(bare, f"(uuid {len(self._uuids)})")


def local_scrubber(*folders: Path) -> Scrubber:
    """What takes this user, this machine, this environment, home, the working folder and `folders` out."""
    paths = [str(Path.home()), os.getcwd(), *(str(folder.resolve()) for folder in folders)]
    return Scrubber([path for path in paths if path != "/"], {_user(), socket.gethostname()}, os.environ)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without an entry, as containers have it; its name is then in no file
        return ""
