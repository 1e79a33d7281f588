"""Users and machines in texts: in URLs and addresses, and behind words such as ``user=`` or ``host:``."""

from __future__ import annotations

import re

from moe_eplb.recording.redact_paths import REMOVED, home_owners

__all__ = ["PERSON", "people_told", "without_people"]

PERSON = (
    r"(?:users?|user[_-]?names?|log(?:in|name)s?|login[_-]?names?|accounts?|owners?|hosts?|host[_-]?names?|fqdn|"
    r"node[_-]?names?|machines?(?:[_-]?names?)?|(?<![a-z])[ug]id|e?mails?|endpoints?|master[_-]?addr)"
)
"""How the name of a setting ends whose value is a user or a machine."""
_SHORTEST_NUMBER = 5
"""Digits from which a number is a person's; shorter ones count or are places: ``hosts=4``."""

# Every pattern takes time linear in the text: runs are taken whole (++), and no pattern begins inside a run of its own.
_URL = re.compile(r"(?<!file)(:(?:\\{0,3}/){2})((?:\\{0,3}/|(?<=\w)'(?=\w)|[^\s\"'<>\\`\0])++)", re.IGNORECASE)
_CLOSING = ")]}.,;:!?"
_AT = re.compile(
    r"(?:\(removed\)|(?<![\w.+%:-])[\w.+%:-]++)@(?:\(removed\)|\[[^\s\]]*+\]?|(?=\w)[\w.-]++)(?:[:/][^\s\"'<>,;)\]}]++)?"
)
_SETTING = re.compile(
    r"(?<![\w-])(?P<name>(?:user|login|account|host|machine|computer)[ ]names?|"
    rf"[\w-]*?(?:{PERSON}|passw(?:or)?ds?|pass(?:phrase|code)s?|pass(?==)|pw))"
    r"(?P<sign>\\{0,3}[\"']?\s{0,8}(?:=(?!=)|:(?!:))\s{0,8})"
    r"(?:(?P<quote>\\{0,3}[\"'])(?:(?!(?P=quote))(?:\\.|.))*+|"
    r"(?!\(removed\))[\[({][^\])}\n]*+[\])}]?|"
    r"[^\s]++(?<![,;])(?:[ ]++(?!--?[A-Za-z]|[\w-]++\s{0,8}[=:])[^\s,;\"'\\]++)*+|\S++)",
    re.IGNORECASE | re.DOTALL,
)
_USER = re.compile(
    r"(?<![\w-])[\w-]*?(?:user|user[_ -]?name|log(?:in|name))\\{0,3}[\"']?\s{0,8}(?:=(?!=)|:(?!:))\s{0,8}\\{0,3}[\"']?"
    r"([\w.-]{4,64}+)",
    re.IGNORECASE,
)
_URL_PEOPLE = re.compile(r":(?:\\{0,3}/){2}(?:([^\s/:@\\]{4,64}+)(?::[^\s/@\\]*+)?@)?([\w.-]{4,253}+)?")
_AT_HOST = re.compile(r"\w@(\w[\w.-]{3,252}+)")


def without_people(text: str) -> str:
    """The text without what stands behind the scheme of a URL, in an address, or behind a word for a user or a machine.

    Nothing of a URL but its scheme stays, since hosts, paths and queries of a company tell of it; those of files are
    paths.
    """
    text = _URL.sub(_without_place, text)
    return _SETTING.sub(_without_value, _AT.sub(REMOVED, text))


def people_told(text: str) -> list[str]:
    """Users and machines that a text tells of, so that their names are to go wherever else they stand.

    A machine counts only if its name holds a digit, a hyphen or a dot: a service may be called as any word is.
    """
    found = home_owners(text) if "/" in text or "\\" in text else []
    if "=" in text or ":" in text:
        found += _USER.findall(text)
        for user, host in _URL_PEOPLE.findall(text):
            found += [user, *_machine(host)]
    if "@" in text:
        found += [name for host in _AT_HOST.findall(text) for name in _machine(host)]
    return [name for name in found if any(map(str.isalpha, name))]


def _machine(host: str) -> list[str]:
    """A machine's name, and its short one if that is none of the words that other texts hold."""
    host = host.rstrip(".-")
    short = host.partition(".")[0]
    return [name for name in {host, short} if re.search(r"[\d.-]", name)]


def _without_place(match: re.Match[str]) -> str:
    slashes, place = match[1], match[2]
    if place.startswith(REMOVED) and not place[len(REMOVED) :].strip(_CLOSING):
        return match[0]
    return slashes + REMOVED + place[len(place.rstrip(_CLOSING)) :]


def _without_value(match: re.Match[str]) -> str:
    start = match.end("quote") if match["quote"] else match.end("sign")
    value = match[0][start - match.start() :]
    digits = sum(map(str.isdigit, value))
    if not any(map(str.isalpha, value)) and digits < _SHORTEST_NUMBER:
        return match[0]
    closing = value[len(value.rstrip(",;")) :]
    return match[0][: start - match.start()] + REMOVED + closing
