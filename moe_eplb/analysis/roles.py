"""What each GPU event is, and to which iteration and layer it belongs.

A role comes from the source itself where it says so, else from the innermost range around the launch that has a role,
ours before those of other NVTX domains, else from the declared name of the stream, else from the event's name. A name
that tells of waiting makes waiting of communication and of the balancer's work wherever their role comes from. Our own
`route` is the one range of compute in which the balancer's work is launched, since few ids are counted where they are
routed; there a name tells. What is left is unknown, is listed, and never counts as compute.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, ROLES, Capture, Table, role_codes
from moe_eplb.analysis.grouping import distinct_rows, members
from moe_eplb.analysis.ranges import Launches
from moe_eplb.analysis.role_table import DomainRule, RoleTable, load_role_table
from moe_eplb.core.events import KINDS, Kind, Role, by_name

__all__ = ["RoleCodes", "RoleTime", "classify", "located", "prepare", "role_times", "unknown_names", "with_roles"]

RoleCodes = NDArray[np.uint8]
_WAITING = (Role.COMM_WAIT, Role.EPLB_WAIT)
_BALANCER = [code for role, code in ROLE_CODE.items() if role.startswith("eplb_")]
_COUNTED = -2


@dataclass(frozen=True, slots=True)
class RoleTime:
    """GPU events of one name and role."""

    name: str
    role: Role
    events: int
    total_ns: int


def prepare(capture: Capture, table: RoleTable | None = None, tables: Sequence[Path] = ()) -> Capture:
    """A capture whose GPU events have roles, iterations and layers, as far as they can be told."""
    table = table or load_role_table(tables)
    return with_roles(located(capture, table), table)


def with_roles(capture: Capture, table: RoleTable | None = None) -> Capture:
    """A capture whose GPU events have roles, and beside them those that their names alone tell."""
    table, gpu = table or load_role_table(), capture.gpu.copy()
    said = gpu["role"] != c.UNSET_ROLE
    gpu["role"], gpu["named"] = classify(capture, table), np.where(said, c.UNSET_ROLE, _by_name(capture, table))
    return replace(capture, gpu=gpu)


def classify(capture: Capture, table: RoleTable | None = None) -> RoleCodes:
    """The code of each GPU event's role [N], see `moe_eplb.analysis.capture.ROLES`."""
    table = table or load_role_table()
    said = capture.gpu["role"]
    by_event_name = _by_name(capture, table)
    found = _on_streams(capture, table, by_event_name)
    with_role = _range_roles(capture, table)
    around = _around(capture, with_role)
    by_range = with_role[around] if len(with_role) else found
    by_range = _told_by_name(capture, around, _waits(by_range, by_event_name), by_event_name)
    found = np.where(around >= 0, by_range, found)
    chosen: RoleCodes = np.where(said != c.UNSET_ROLE, said, found).astype(np.uint8)
    return chosen


def located(capture: Capture, table: RoleTable) -> Capture:
    """A capture whose GPU events know their iteration and layer, from ranges that name them.

    Iterations come from what was open at the launch; layers too, but for graph replays from the capture, where there is
    one range around each layer and not one around them all. A layer that our own range names is that of its thread's
    launches alone, as a role is, see `_around`.
    """
    gpu, launches = capture.gpu.copy(), Launches(capture)
    if (gpu["iteration"] == c.UNKNOWN).all():
        rows, numbers = _iteration_ranges(capture, table)
        gpu["iteration"] = _number_around(launches, capture.ranges[rows], numbers, at_capture=False)
    if (gpu["layer"] == c.UNKNOWN).all():
        rows, numbers = _layer_ranges(capture, table)
        private = _is_ours(capture)[rows]
        captured = _number_around(launches, capture.ranges[rows], numbers, private, at_capture=True)
        launched = _number_around(launches, capture.ranges[rows], numbers, private, at_capture=False)
        gpu["layer"] = np.where(captured != c.UNKNOWN, captured, launched)
    return replace(capture, gpu=gpu)


def role_times(capture: Capture, roles: RoleCodes) -> list[RoleTime]:
    """Events by name and role, longest first."""
    gpu = capture.gpu
    packed, inverse = np.unique(gpu["name"].astype(np.int64) * 256 + roles, return_inverse=True)
    totals = np.zeros(len(packed), np.int64)
    np.add.at(totals, inverse, gpu["end"] - gpu["start"])
    counts = np.bincount(inverse, minlength=len(packed))
    rows = zip(packed.tolist(), counts.tolist(), totals.tolist(), strict=True)
    times = [RoleTime(capture.names[key // 256], ROLES[key % 256], count, total) for key, count, total in rows]
    return sorted(times, key=lambda time: (-time.total_ns, time.name))


def unknown_names(capture: Capture, roles: RoleCodes) -> list[RoleTime]:
    """What no rule knows, longest first; a table of the user's can name it."""
    return [time for time in role_times(capture, roles) if time.role is Role.UNKNOWN]


def _by_name(capture: Capture, table: RoleTable) -> RoleCodes:
    used, inverse = np.unique(capture.gpu["name"], return_inverse=True)
    codes = [ROLE_CODE[table.by_name(capture.names[name])] for name in used.tolist()]
    return np.array(codes, np.uint8)[inverse.reshape(-1)]


def _on_streams(capture: Capture, table: RoleTable, codes: RoleCodes) -> RoleCodes:
    """Roles by name, as they are meant on streams with a declared name."""
    gpu, found = capture.gpu, codes.copy()
    for (rank, device, stream), name in capture.streams.items():
        rule = next((rule for rule in table.streams if rule.name.search(name)), None)
        if rule is None:
            continue
        meaning = np.array([ROLE_CODE[rule.roles.get(role, role)] for role in ROLES], np.uint8)
        here = (gpu["rank"] == rank) & (gpu["device"] == device) & (gpu["stream"] == stream)
        found[here] = meaning[codes[here]]
    return found


def _around(capture: Capture, with_role: RoleCodes) -> NDArray[np.int64]:
    """Row of the innermost range that has a role, at capture for graph nodes; UNKNOWN where there is none.

    Any of our own ranges goes before all others: a library's around a collective of ours does not say what it is for.
    One of ours tells only of what its own thread launches: while the updater moves weights, the model's thread goes on.
    """
    has_role, ours = with_role != c.UNSET_ROLE, _is_ours(capture)
    found = np.full(len(capture.gpu), c.UNKNOWN, np.int64)
    launches = Launches(capture)
    for rows in (np.flatnonzero(has_role & ~ours), np.flatnonzero(has_role & ours)):
        for at_capture in (False, True):  # what was said at capture is closer to the kernel and replaces the rest
            if len(rows):
                around = launches.around(capture.ranges[rows], ours[rows], at_capture=at_capture)
                found = np.where(around >= 0, rows[around], found)
    return found


def _range_roles(capture: Capture, table: RoleTable) -> RoleCodes:
    keys = capture.ranges["domain"].astype(np.int64) << 32 | capture.ranges["text"].astype(np.int64)
    distinct, inverse = np.unique(keys, return_inverse=True)
    codes = [_range_role(capture, table.domains, key >> 32, key & 0xFFFFFFFF) for key in distinct.tolist()]
    found: RoleCodes = np.array(codes, np.uint8)[inverse.reshape(-1)]
    return found


def _range_role(capture: Capture, rules: Iterable[DomainRule], domain: int, text: int) -> int:
    names = capture.names[domain] if domain >= 0 else "", capture.names[text]
    for rule in rules:
        if rule.domain.search(names[0]) and rule.text.search(names[1]):
            kind = by_name(names[1].partition("/")[0])
            role = rule.role or (KINDS[kind].role if kind is not None else Role.OTHER)
            return c.UNSET_ROLE if role is Role.OTHER and rule.role is None else ROLE_CODE[role]
    return c.UNSET_ROLE


def _told_by_name(
    capture: Capture, around: NDArray[np.int64], by_range: RoleCodes, by_event_name: RoleCodes
) -> RoleCodes:
    """The balancer's own work within our `route`, by its names.

    A collective there is the sum of statistics, for routing makes none.
    """
    route = KINDS[Kind.ROUTE].name
    texts = [text for text, name in enumerate(capture.names) if name.partition("/")[0] == route]
    routes = np.flatnonzero(_is_ours(capture) & np.isin(capture.ranges["text"], texts))
    within = np.isin(around, routes)
    told: RoleCodes = np.where(within & np.isin(by_event_name, _BALANCER), by_event_name, by_range).astype(np.uint8)
    told[within & (by_event_name == ROLE_CODE[Role.COMM])] = ROLE_CODE[Role.EPLB_ALLREDUCE]
    return told


def _waits(codes: RoleCodes, by_event_name: RoleCodes) -> RoleCodes:
    """A range tells for whom work is done, only its name that it is waiting."""
    waiting = np.isin(by_event_name, role_codes(_WAITING))
    communicates = codes == ROLE_CODE[Role.COMM]
    balances = np.isin(codes, role_codes(role for role in ROLES if role.startswith("eplb_")))
    found: RoleCodes = codes.copy()
    found[waiting & communicates] = ROLE_CODE[Role.COMM_WAIT]
    found[waiting & balances] = ROLE_CODE[Role.EPLB_WAIT]
    return found


def _iteration_ranges(capture: Capture, table: RoleTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of ranges that are an iteration, and their numbers; ours say it in their payload.

    What our checks launch behind an iteration is no part of it, and would be most of its length.
    """
    ranges, numbers = capture.ranges, _numbers(capture, table.iterations)
    checks = [number for number, name in enumerate(capture.names) if name == KINDS[Kind.CHECK].name]
    ours = (ranges["payload"] >= 0) & _is_ours(capture) & ~np.isin(ranges["text"], checks)
    numbers = np.where(ours, np.minimum(ranges["payload"], 1 << 30), numbers)
    counted = np.flatnonzero(numbers == _COUNTED)
    keys, group = distinct_rows([ranges["rank"][counted], ranges["text"][counted]])
    for mine in members(group, len(keys)):
        numbers[counted[mine]] = np.arange(len(mine))
    rows = np.flatnonzero(numbers >= 0)
    return rows, numbers[rows]


def _layer_ranges(capture: Capture, table: RoleTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    numbers = _numbers(capture, table.layers)
    ours = np.flatnonzero(_is_ours(capture))
    texts, used = np.unique(capture.ranges["text"][ours], return_inverse=True)
    said = np.array([_layer_of_ours(capture.names[text]) for text in texts.tolist()], np.int64)[used.reshape(-1)]
    numbers[ours] = np.where(said >= 0, said, numbers[ours])
    rows = np.flatnonzero(numbers >= 0)
    return rows, numbers[rows]


def _layer_of_ours(text: str) -> int:
    _, slash, layer = text.partition("/")
    return int(layer) if slash and layer.isascii() and layer.isdigit() and len(layer) < 9 else c.UNKNOWN


def _numbers(capture: Capture, patterns: Iterable[re.Pattern[str]]) -> NDArray[np.int64]:
    """The number that each range's text names, `_COUNTED` if it matches without one, UNKNOWN if it does not match."""
    texts, inverse = np.unique(capture.ranges["text"], return_inverse=True)
    found = [_number(capture.names[text], patterns) for text in texts.tolist()]
    return np.array(found, np.int64)[inverse.reshape(-1)]


def _number(text: str, patterns: Iterable[re.Pattern[str]]) -> int:
    for pattern in patterns:
        match = pattern.search(text)
        if match and not pattern.groups:
            return _COUNTED
        if match and match[1].isascii() and match[1].isdigit() and len(match[1]) < 10:
            return int(match[1])
    return c.UNKNOWN


def _number_around(
    launches: Launches,
    ranges: Table,
    numbers: NDArray[np.int64],
    private: NDArray[np.bool_] | None = None,
    *,
    at_capture: bool,
) -> NDArray[np.int64]:
    around = launches.around(ranges, private, at_capture=at_capture)
    return np.where(around >= 0, numbers[around] if len(numbers) else around, c.UNKNOWN)


def _is_ours(capture: Capture) -> NDArray[np.bool_]:
    if "moe_eplb" not in capture.names:
        return np.zeros(len(capture.ranges), np.bool_)
    ours: NDArray[np.bool_] = capture.ranges["domain"] == capture.names.index("moe_eplb")
    return ours
