"""What the balancer costs the main stream: how long it stood still because of the balancer.

Idle time of the main stream counts when it ends at an event for which the stream had to wait, when that event stands
behind balancer work of another stream, and from when everything else was ready: the event before it on the main stream
and all else that it waited for had ended, and it had been launched. Where the balancer was done before that, it cost
nothing. Balancer waits that spin on the main stream count as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import ROLE_CODE, ROLES, Capture, role_codes
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.intervals import Intervals, grouped_length, intervals
from moe_eplb.analysis.work import on_main, replayed
from moe_eplb.core.events import Role

__all__ = ["Stall", "main_stall"]

_BALANCER = role_codes(role for role in ROLES if role.startswith("eplb_"))


@dataclass(frozen=True)
class Stall:
    """Main-stream time lost to the balancer, ns by (rank, iteration)."""

    idle: dict[tuple[int, int], int]
    spin: dict[tuple[int, int], int]

    @property
    def total(self) -> int:
        """The sum over ranks and iterations."""
        return sum(self.idle.values()) + sum(self.spin.values())


def main_stall(capture: Capture) -> Stall | None:
    """The stall of every rank and iteration; None when the source does not record every wait between streams, as
    none does of what a replayed graph waits for.

    Args:
        capture: One with roles.
    """
    dependencies = Dependencies(capture)
    if not dependencies.waits_recorded or replayed(capture).any():
        return None
    gpu = capture.gpu
    main = on_main(capture)
    held, on = dependencies.waits.T
    balancer = ~main[on] & np.isin(gpu["role"][on], _BALANCER)
    ready = _ready(dependencies, held[~balancer], on[~balancer])
    mine = balancer & main[held]
    held, on = held[mine], on[mine]
    late = held[(gpu["end"][on] > ready[held]) & (gpu["start"][held] > ready[held])]
    spins = np.flatnonzero(main & (gpu["role"] == ROLE_CODE[Role.EPLB_WAIT]))
    return Stall(
        idle=_by_iteration(capture, late, intervals(ready[late], gpu["start"][late])),
        spin=_by_iteration(capture, *_lasting(capture, spins)),
    )


def _ready(dependencies: Dependencies, held: NDArray[np.int64], on: NDArray[np.int64]) -> NDArray[np.int64]:
    """From when [N] each event could have begun but for the balancer.

    Args:
        dependencies: Of all events.
        held, on: The waits [W] that are not for the balancer, see `Dependencies.waits`.
    """
    end, before = dependencies.capture.gpu["end"], dependencies.previous
    launched = np.where(dependencies.call >= 0, dependencies.launch_end, np.iinfo(np.int64).min)
    ready = np.where(before >= 0, np.maximum(end[before], launched), launched)
    np.maximum.at(ready, held, end[on])
    return ready


def _lasting(capture: Capture, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Intervals]:
    rows = rows[capture.gpu["end"][rows] > capture.gpu["start"][rows]]
    return rows, intervals(capture.gpu["start"][rows], capture.gpu["end"][rows])


def _by_iteration(capture: Capture, rows: NDArray[np.int64], times: Intervals) -> dict[tuple[int, int], int]:
    """The length of times, that of each GPU for itself, by rank and iteration of their rows."""
    distinct, group = distinct_rows([capture.gpu[name][rows] for name in ("rank", "iteration", "device")])
    sums: dict[tuple[int, int], int] = {}
    for (rank, iteration, _), ns in zip(
        distinct.tolist(), grouped_length(times, group, len(distinct)).tolist(), strict=True
    ):
        sums[rank, iteration] = sums.get((rank, iteration), 0) + ns
    return sums
