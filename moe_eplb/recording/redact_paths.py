"""Absolute paths in texts: where something lies tells of a person and a project, a file's own name does not."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["REMOVED", "Paths", "home_owners"]

REMOVED = "(removed)"
"""What stands where something was taken out."""

_PRIVATE_ROOTS = (
    *("home", "root", "Users", "work", "workspace", "workspaces", "mnt", "scratch", "data", "tmp", "var/tmp"),
    *("opt", "var/lib", "run/user", "gpfs", "lustre", "nfs", "srv", "project", "projects", "fsx", "efs", "private"),
)
"""Folders that are private by themselves; of all others, what has two parts or more."""
_PUBLIC = r"(?:usr/(?:bin|include|lib(?:32|64)?|sbin|share)|lib(?:32|64)?|dev/nvidia[\w-]*)(?![\w-])"
"""Folders of the system, the same on every machine."""
_PART = r"(?:\\[ ]|[^\s/:;,'\"<>()|\0])"
_OPTION = r"(?<=[\s\"'=,]-[A-Z])|(?<=^-[A-Z])"
"""A compiler's option such as -I or -L, which a path follows without a space."""
_START = rf"(?:(?<![\w.)\]}}>/-])|{_OPTION})"
"""Behind a letter, a dot or a bracket a slash divides a name, such as ``wait_gpu/3``."""
_KNOWN_START = rf"(?:{_START}|(?<=/)|(?<=[)\]}}>])(?<!\(removed\)))"
_OTHERS = (
    rf"(?i:(?<=file:))//{_PART}*+(?:/{_PART}*+)*+",
    rf"{_START}/(?=\w)(?!{_PUBLIC}){_PART}++/{_PART}++(?:/{_PART}*+)*+",
    rf"(?<![\w./~-])~[\w.-]{{0,64}}/{_PART}*+(?:/{_PART}*+)*+",
)
_WINDOWS = re.compile(r"(?:(?<![A-Za-z0-9])[A-Za-z]:\\|(?<![\w\\:])\\\\(?=[\w.-]++\\))[^\s:;,'\"<>()|*?\0]*+")
_FILE = re.compile(
    r"[\w.+-]+\.(?:a|bin|c|cc|cpp|cu|cubin|cuh|cxx|db|fatbin|gz|h|hh|hpp|html|json|jsonl|log|npy|npz|o|pt|ptx|pth|py|pyi|"
    r"pyx|safetensors|sh|so(?:\.\d+)*|sqlite|toml|txt|xz|yaml|yml)|python[\d.]*"
)
"""Names that stay: a dot alone makes no file, since users are called ``first.last``."""
_HOME = re.compile(r"[/\\](?:home|Users|users)[/\\]{1,4}([A-Za-z0-9_.-]+)")


def home_owners(text: str) -> list[str]:
    """The users whose home folders a text names."""
    return _HOME.findall(text)


class Paths:
    """Takes paths out of texts.

    Args:
        folders: Absolute paths that are private by themselves, besides the usual ones.
    """

    def __init__(self, folders: Iterable[str] = ()) -> None:
        self._folders = {folder.rstrip("/") for folder in folders} - {""}
        roots = [re.escape(f"/{root}") for root in _PRIVATE_ROOTS]
        roots += [re.escape(folder) for folder in sorted(self._folders, key=len, reverse=True)]
        known = rf"{_KNOWN_START}(?:{'|'.join(roots)})(?=/|$|[^\w./-])(?:/{_PART}*+)*+"
        self._path = re.compile("|".join((known, *_OTHERS)))

    def removed(self, text: str) -> str:
        """The text without private paths; a file keeps its own name."""
        text = self._path.sub(lambda match: self._shortened(match[0], "/"), text)
        return _WINDOWS.sub(lambda match: self._shortened(match[0].replace("\\\\", "\\"), "\\"), text)

    def _shortened(self, path: str, slash: str) -> str:
        """Which module a range comes from says nothing of where it was installed."""
        folder, _, last = path.rstrip(slash).rpartition(slash)
        bare = path.rstrip(slash) in self._folders or folder.count(slash) < 2 or not _FILE.fullmatch(last)
        return REMOVED if bare else f"{REMOVED}/{last}"
