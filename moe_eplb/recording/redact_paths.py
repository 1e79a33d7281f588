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
_WITHIN = r"(?<=\w)'(?=\w)|(?<=[ ])\([^()/\\\n\r\0]*+\)|(?!(?<=[ ])[A-Za-z]:\\)"
"""In a name with spaces: an apostrophe, words in brackets, and anything but the beginning of another drive."""
_SPACED = rf"(?:{_WITHIN}[^\n\r\t\v\f\0/:;,'\"<>()|])*+"
_GOES_ON = r"(?<![ =])(?<![ ]-[A-Z])"
"""Before a slash: a space, a compiler's option and an assignment begin another path, words do not."""
_TAIL = rf"(?:/{_PART}*+)*+(?:{_SPACED}{_GOES_ON}(?:/{_PART}*+)++)*+{_SPACED}"
_OPTION = r"(?<=[\s\"'=,]-[A-Z])|(?<=^-[A-Z])"
"""A compiler's option such as -I or -L, which a path follows without a space."""
_START = rf"(?:(?<![\w.)\]}}>/-])|{_OPTION})"
"""Behind a letter, a dot or a bracket a slash divides a name, such as ``wait_gpu/3``."""
_KNOWN_START = rf"(?:{_START}|(?<=/)|(?<=[)\]}}>])(?<!\(removed\)))"
_OTHERS = (
    rf"(?i:(?<=file:))//{_PART}*+{_TAIL}",
    rf"{_START}//?(?=\w)(?!{_PUBLIC}){_PART}++{_SPACED}{_GOES_ON}/{_PART}++{_TAIL}",
    rf"(?:(?<![\w./~-])|{_OPTION})~[\w.-]{{0,64}}/{_PART}*+{_TAIL}",
)
_DRIVE = rf"(?:(?:(?<![A-Za-z0-9])|{_OPTION})[A-Za-z]:\\|(?<![\w\\:])\\\\(?=[\w.-]++\\))"
_WINDOWS = re.compile(
    rf"{_DRIVE}[^\s:;,'\"<>()|*?\0]*+(?:{_WITHIN}[^\n\r\t\v\f\0:;,'\"<>()|*?])*+",
)
_NO_NAME = re.compile(r"--[A-Za-z]|-[A-Za-z](?!\w)|[\w-]+=")
"""A word that no name goes on with: an option, an assignment."""
_WORD = re.compile(r"(?:\\ |\S)+")
_FILE = re.compile(
    r"[\w.+-]+\.(?:a|bin|c|cc|cpp|cu|cubin|cuh|cxx|db|fatbin|gz|h|hh|hpp|html|json|jsonl|log|npy|npz|o|pt|ptx|pth|py|pyi|"
    r"pyx|safetensors|sh|so(?:\.\d+)*|sqlite|toml|txt|xz|yaml|yml)|python[\d.]*"
)
"""Names that stay: a dot alone makes no file, since users are called ``first.last``."""
_HOME = re.compile(r"[/\\](?:home|Users|users)[/\\]{1,4}([\w.-]++(?:(?:[ ][\w.-]++)++(?=[/\\]))?+)")


def home_owners(text: str) -> list[str]:
    """The users whose home folders a text names; of a name with spaces also the first word."""
    found = _HOME.findall(text)
    return [*found, *(name.partition(" ")[0] for name in found if " " in name)]


class Paths:
    """Takes paths out of texts.

    Args:
        folders: Absolute paths that are private by themselves, besides the usual ones.
    """

    def __init__(self, folders: Iterable[str] = ()) -> None:
        self._folders = {folder.rstrip("/") for folder in folders} - {""}
        roots = [re.escape(f"/{root}") for root in _PRIVATE_ROOTS]
        roots += [re.escape(folder) for folder in sorted(self._folders, key=len, reverse=True)]
        known = rf"{_KNOWN_START}(?:{'|'.join(roots)})(?=/|$|[^\w./-]){_TAIL}"
        self._path = re.compile("|".join((known, *_OTHERS)))

    def removed(self, text: str) -> str:
        """The text without private paths; a file keeps its own name."""
        text = self._path.sub(lambda match: self._shortened(match[0], "/"), text)
        return _WINDOWS.sub(lambda match: self._shortened(match[0].replace("\\\\", "\\"), "\\"), text)

    def _shortened(self, path: str, slash: str) -> str:
        """Which module a range comes from says nothing of where it was installed."""
        begin = path.rfind(slash) + 1
        end = begin + _end_of_name(path[begin:])
        path, rest = path[:end].rstrip(slash), path[end:]
        folder, _, last = path.rpartition(slash)
        bare = path in self._folders or folder.count(slash) < 2 or not _FILE.fullmatch(last)
        return (REMOVED if bare else f"{REMOVED}/{last}") + rest


def _end_of_name(text: str) -> int:
    """Where a name that may hold spaces ends: behind a file's suffix or before an option, else with the whole text.

    A folder called ``bob smith`` cannot be told from ``bob`` and a word behind it, so both go.
    """
    end = 0
    for word in _WORD.finditer(text):
        if word.start() and _NO_NAME.match(word[0]):
            break
        end = word.end()
        if _FILE.fullmatch(word[0]):
            break
    return end
