"""Colours and patterns of roles, for every picture alike.

The hues are those of Okabe and Ito ("Color Universal Design"), made darker or lighter until each stands out from both
backgrounds of its scheme by 3:1 at least (WCAG 2.2, 1.4.11). Waiting has the hue of what is waited for and is hatched,
and hues that are close to each other differ in pattern, so that no role is told by its colour alone.
"""

from __future__ import annotations

from typing import NamedTuple

from moe_eplb.core.events import Role

__all__ = ["RANGE", "ROLES", "SCHEMES", "Look", "Scheme", "contrast", "ink_on"]


class Look(NamedTuple):
    """How a role looks. Patterns: solid, slash, backslash, lines, bars, dots, cross, outline."""

    light: str
    dark: str
    pattern: str
    meaning: str


class Scheme(NamedTuple):
    """A background, the background of every other lane, ink for text, and the mark of exposed stretches."""

    background: str
    stripe: str
    ink: str
    faint: str
    exposed: str


SCHEMES = {
    "light": Scheme("#ffffff", "#f4f6f8", "#1b1f24", "#57606a", "#b3001b"),
    "dark": Scheme("#14171c", "#1b1f26", "#e6e9ee", "#9aa4b2", "#ff7b7b"),
}

ROLES: dict[Role, Look] = {
    Role.COMPUTE: Look("#0072b2", "#56b4e9", "solid", "the model's own work"),
    Role.COMM: Look("#b5508c", "#e08fbd", "solid", "communication that moves data"),
    Role.COMM_WAIT: Look("#b5508c", "#e08fbd", "slash", "communication that waits"),
    Role.EPLB_WAIT: Look("#00805a", "#1fc79a", "backslash", "the balancer waits"),
    Role.EPLB_STATISTIC: Look("#00805a", "#1fc79a", "solid", "statistics of the balancer"),
    Role.EPLB_ALLREDUCE: Look("#d55e00", "#ff8f4a", "solid", "the balancer's sum over ranks"),
    Role.EPLB_MIGRATE: Look("#8a6d00", "#f0e442", "bars", "weights that the balancer moves"),
    Role.EPLB_SIGNAL: Look("#2b2f36", "#f5f5f5", "lines", "hand-over to the balancer"),
    Role.MEMCPY: Look("#2b82b8", "#9bd3f7", "dots", "copies"),
    Role.OTHER: Look("#767676", "#9c9c9c", "solid", "other work"),
    Role.UNKNOWN: Look("#4a4a4a", "#cfcfcf", "cross", "no rule knows it"),
}
RANGE = Look("#6b7280", "#9aa4b2", "outline", "a range of the host without a role")


def contrast(one: str, other: str) -> float:
    """Contrast of two colours ``#rrggbb``, 1 to 21, as WCAG 2.2 defines it."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


def _luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
