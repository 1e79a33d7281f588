"""What in a text tells of a person, a machine or its environment, and how it is taken out."""

from __future__ import annotations

import getpass
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from moe_eplb.recording.redact_names import is_secret
from moe_eplb.recording.redact_paths import REMOVED, Paths, home_owners

__all__ = ["REMOVED", "Scrubber", "is_secret_option", "local_scrubber"]

_COMMON_NAMES = frozenset(
    (
        *("root", "user", "users", "localhost", "local", "admin", "python", "linux", "ubuntu", "debian", "removed"),
        *("uuid", "main", "node", "head", "master", "host", "server", "worker", "compute", "login", "file"),
    )
)
"""Names of users and machines that say nothing, and that other texts hold in another meaning."""
_SHORTEST_NAME = 4
_SHORTEST_SECRET = 8
_MOST_PASSES = 8
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth|cookie", re.IGNORECASE)

# Every pattern takes time linear in the text: runs are taken whole (++), and no pattern begins inside a run of its own.
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]{1,40}-----.*?(?:-----END [A-Z0-9 ]{1,40}-----|\Z)", re.DOTALL)
_ASSIGNMENT = re.compile(
    r"(?<![\w.-])([A-Z][A-Z0-9_]{2,}+|[a-z]++_proxy)="
    r"(?:[^\s\0;]++|(?![\s\0;]++\w++=)(?:[^\S\n]|;)++)*+"
)
_OPTION = re.compile(
    r"(?<![\w-])(--?(?=[\w-]*?(?:token|key|secret|passw|credential|auth))[\w-]++(?:[= ]|\\{0,3}[\"'],) {0,7})"
    r"(?!\\{0,3}[\"']?--[A-Za-z])\S+",  # else a flag without a value would take another option for one
    re.IGNORECASE,
)
_OPTION_ALONE = re.compile(r"--?[\w-]*(?:token|key|secret|passw|credential|auth)[\w-]*", re.IGNORECASE)
_PAIR = re.compile(
    r"(?<![\w-])(?P<name>(?=[\w-]*?(?:token|key|secret|passw|passphrase|pwd|credential|auth|cookie|bearer))[\w-]++)"
    r"(?P<sign>\\{0,3}[\"']?\s{0,8}(?:=(?!=)|:(?!:))\s{0,8})"
    r"(?:(?P<quote>\\{0,3}[\"'])(?P<quoted>(?:(?!(?P=quote))(?:\\.|.))*+)|(?P<plain>(?:(?:bearer|basic|token)\s{1,4})?\S+))",
    re.IGNORECASE | re.DOTALL,
)
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_|gh[pousr]_|github_pat_)(?=[A-Za-z]*\d)\w{8,}|sk-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{8,}|"
    r"eyJ[\w-]*+(?:\.[\w-]++)+|eyJ[\w-]{12,}|(?:glpat|xox[a-z])-[\w-]{8,}|Bearer\s{1,4}[\w.~+/=-]{8,})"
)
_LOGIN = re.compile(r"(?<=://)[^/\s]*(?=@)")
_SERIAL = re.compile(r"(serial(?: ?(?:number|no\.?))?\s{0,8}[:=]\s{0,8})\S+", re.IGNORECASE)
_UUID = re.compile(
    r"\b(?:(?:GPU|MIG|NIC)-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.IGNORECASE
)
_MAC = re.compile(r"\b[0-9a-f]{2}(?::[0-9a-f]{2}){5,19}\b|\b[0-9a-f]{4}(?::[0-9a-f]{4}){3}\b", re.IGNORECASE)
_ADDRESS = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_ADDRESS6 = re.compile(
    r"(?<![\w:.])(?:[23][0-9a-f]{3}|f[cdf][0-9a-f]{2}|fe[89a-f][0-9a-f])"
    r"(?::[0-9a-f]{0,4}(?![0-9a-z])){2,7}(?:%[\w.-]{1,32})?",
    re.IGNORECASE,
)
"""Of the prefixes in use alone: ``c10::add`` and ``12:34:56`` are none."""


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
        self._paths = Paths(folders)
        self._names: set[str] = set()
        self._secrets = [
            value
            for name, value in (environment or {}).items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
        ]
        self._uuids: dict[str, str] = {}
        self._compile()
        self.learn(names)

    def learn(self, names: Iterable[str]) -> None:
        """Take these names of users and machines out as well, from now on; of a machine also its short name."""
        new = {part for name in names if name != REMOVED for part in (name, *_parts(name))} - self._names
        if new:
            self._names |= new
            self._compile()

    def learn_homes(self, text: str) -> None:
        """Take the owners of the home folders in a text for users."""
        self.learn(home_owners(text))

    def text(self, value: str) -> str:
        """The text without what must not stay; a text that holds nothing of it comes back as it is."""
        return self._scrub(value)

    def field(self, value: str) -> str:
        """What stands for a value that must not stay: the same for the same UUID, so that joins hold."""
        return self._pseudonym(value) if _UUID.fullmatch(value) else REMOVED

    def _compile(self) -> None:
        long = [n for n in self._names if len(n) >= _SHORTEST_NAME and n.lower() not in _COMMON_NAMES]
        words = "|".join(re.escape(name) for name in sorted(long, key=len, reverse=True))
        self._name = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None
        self._scrub = lru_cache(maxsize=1 << 16)(self._uncached)

    def _uncached(self, value: str) -> str:
        """Until nothing more is found: what stands beside a text that goes may be one by itself then."""
        for _ in range(_MOST_PASSES):
            before, value = value, self._once(value)
            if value == before:
                break
        return value

    def _once(self, value: str) -> str:
        for secret in self._secrets:
            value = value.replace(secret, REMOVED)
        value = _PEM.sub(REMOVED, value)
        value = _ASSIGNMENT.sub(rf"\1={REMOVED}", value)
        value = _OPTION.sub(rf"\1{REMOVED}", value)
        value = _PAIR.sub(_without_secret, value)
        value = _SHAPE.sub(REMOVED, value)
        value = _SERIAL.sub(rf"\1{REMOVED}", value)
        value = _LOGIN.sub(REMOVED, value)
        value = _UUID.sub(lambda match: self._pseudonym(match[0]), value)
        value = _ADDRESS6.sub(_without_address, value)
        value = _ADDRESS.sub(REMOVED, _MAC.sub(REMOVED, value))
        value = self._paths.removed(value)
        return self._name.sub(REMOVED, value) if self._name else value

    def _pseudonym(self, uuid: str) -> str:
        bare = uuid.lower()[-36:]
        return self._uuids.setdefault(bare, f"(uuid {len(self._uuids)})")


def is_secret_option(text: str) -> bool:
    """Whether the next argument of a command line is the secret that this one announces: ``--hf-token``."""
    return _OPTION_ALONE.fullmatch(text) is not None


def _parts(name: str) -> list[str]:
    """The short name and the domain of a machine that is known by its full one; users may be called ``first.last``."""
    short, _, domain = name.partition(".")
    if not domain or ("." not in domain and not re.search(r"[\d-]", short)):
        return []
    return [part for part in (short, domain if "." in domain else "") if re.search("[A-Za-z]", part)]


def _without_secret(match: re.Match[str]) -> str:
    quote, value = match["quote"] or "", match["quoted"] if match["plain"] is None else match["plain"]
    number = re.search("[A-Za-z]", value) is None
    if not value or not is_secret(match["name"], number=number):
        return match[0]
    return f"{match['name']}{match['sign']}{quote}{REMOVED}"


def _without_address(match: re.Match[str]) -> str:
    address, _, _ = match[0].partition("%")
    bare = address if address.endswith("::") else address.rstrip(":")
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        return match[0]
    return REMOVED + address[len(bare) :]


def local_scrubber(*folders: Path) -> Scrubber:
    """What takes this user, this machine, this environment, home, the working folder and `folders` out."""
    paths = [str(Path.home()), os.getcwd(), *(str(folder.resolve()) for folder in folders)]
    return Scrubber([path for path in paths if path != "/"], {_user(), socket.gethostname()}, os.environ)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without an entry, as containers have it; its name is then in no file
        return ""
