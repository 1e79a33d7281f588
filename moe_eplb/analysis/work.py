"""What overlap is measured on: finished device work as columns, from a run's records or from any capture."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis import intervals
from moe_eplb.analysis.capture import ROLE_CODE, ROLES, Capture, role_codes
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.intervals import Intervals
from moe_eplb.analysis.ranges import Launches
from moe_eplb.analysis.trace import Records
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import KINDS, STREAMS, UPDATER, Role

__all__ = ["MAIN", "Work", "main_streams", "on_main", "replayed", "work_of_capture", "work_of_records"]

MAIN = STREAMS.index("Main")
_LONGEST = 1 << 62
_BALANCER = role_codes(role for role in ROLES if role.startswith("eplb_"))


@dataclass(frozen=True)
class Work:
    """Columns [N]. `place` numbers the GPU; nothing hides behind what runs on another one."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    role: NDArray[np.uint8]
    stream: NDArray[np.int64]
    rank: NDArray[np.int64]
    place: NDArray[np.int64]
    layer: NDArray[np.int64]
    iteration: NDArray[np.int64]
    main: NDArray[np.bool_]
    updater: NDArray[np.bool_]
    """Work of the balancer's updater thread, which is no device work."""
    unseen: NDArray[np.bool_]
    """On a GPU of which graph replays were traced as a whole, so that any work may have run in them."""

    def __len__(self) -> int:
        return len(self.start)

    def where(self, mask: NDArray[np.bool_]) -> Work:
        """The work that a mask [N] selects."""
        return Work(*(getattr(self, field.name)[mask] for field in fields(self)))

    def of(self, *roles: Role) -> NDArray[np.bool_]:
        """Mask [N] of the work with one of some roles."""
        return np.isin(self.role, role_codes(roles))

    def within(self, whole: Work) -> Intervals:
        """Intervals with every GPU in a stretch of time of its own, on an axis that fits a whole of which this is part.

        Raises:
            TraceError: E062 the whole's times lie too far apart.
        """
        if not len(self):
            return intervals.EMPTY
        shift = self.place * (whole._span + 1) - whole._first
        return intervals.intervals(self.start + shift, self.end + shift)

    @property
    def _first(self) -> int:
        return int(self.start.min())

    @property
    def _span(self) -> int:
        span = int(self.end.max()) - self._first
        if (span + 1) * (int(self.place.max()) + 1) > _LONGEST:
            why = f"{span} ns on {int(self.place.max()) + 1} GPUs"
            raise TraceError("E062", "a trace has times that lie too far apart", why=why)
        return span


def work_of_records(records: Records) -> Work:
    """All finished device records, and the updater's."""
    done = records.where((records.stream <= UPDATER) & (records.end > records.start))
    codes = {int(kind): ROLE_CODE[info.role] for kind, info in KINDS.items()}
    kinds, inverse = np.unique(done.kind, return_inverse=True)
    roles = np.array([codes.get(kind, ROLE_CODE[Role.UNKNOWN]) for kind in kinds.tolist()], np.uint8)
    return Work(
        start=done.start, end=done.end, role=roles[inverse.reshape(-1)], stream=done.stream, rank=done.rank,
        place=done.rank, layer=done.layer, iteration=done.iteration, main=done.stream == MAIN,
        updater=done.stream == UPDATER, unseen=np.zeros(len(done.start), np.bool_),
    )  # fmt: skip


def work_of_capture(capture: Capture, main: dict[tuple[int, int], int] | None = None) -> Work:
    """All GPU events that lasted, of a capture that `moe_eplb.analysis.roles.prepare` has been through.

    Args:
        capture: Its events must have roles.
        main: The main stream by (rank, device), by default `main_streams`.
    """
    lasted = capture.gpu["end"] > capture.gpu["start"]
    gpu = capture.gpu[lasted]
    _, place = distinct_rows([gpu["rank"], gpu["device"]])
    unseen = np.isin(place, place[gpu["kind"] == c.GRAPH])
    columns = {name: gpu[name].astype(np.int64) for name in ("start", "end", "stream", "rank", "layer", "iteration")}
    return Work(
        **columns, role=gpu["role"], place=place, updater=gpu["kind"] == c.UPDATER_WORK,
        main=on_main(capture, main)[lasted], unseen=unseen,
    )  # fmt: skip


def on_main(capture: Capture, main: dict[tuple[int, int], int] | None = None) -> NDArray[np.bool_]:
    """Mask [N] of the GPU events on the main stream.

    A device spreads a graph's nodes over streams of its own choice, whose numbers mean nothing: of a replay all that is
    not the balancer's counts as the main stream's, that of other auxiliary streams too.

    Args:
        capture, main: See `work_of_capture`.
    """
    main = main_streams(capture) if main is None else main
    gpu = capture.gpu
    gpus, place = distinct_rows([gpu["rank"], gpu["device"]])
    of_place = np.array([main.get((rank, device), c.UNKNOWN) for rank, device in gpus.tolist()], np.int64)[place]
    by_role = ~np.isin(gpu["role"], _BALANCER)
    there: NDArray[np.bool_] = np.where(replayed(capture), by_role, gpu["stream"] == of_place)
    there &= gpu["kind"] != c.UPDATER_WORK
    return there


def replayed(capture: Capture) -> NDArray[np.bool_]:
    """Mask [N] of the events of graph replays: by their kind or node, or by the call that launched them."""
    launching = np.array(["GraphLaunch" in name for name in capture.names], np.bool_)
    call = Launches(capture).call
    launched = np.zeros(len(capture.gpu), np.bool_)
    known = call >= 0
    launched[known] = launching[capture.calls["name"][call[known]]]
    found: NDArray[np.bool_] = launched | (capture.gpu["graph_node"] >= 0) | (capture.gpu["kind"] == c.GRAPH)
    return found


def main_streams(capture: Capture) -> dict[tuple[int, int], int]:
    """The main stream of each (rank, device): the one named Main, else the one with the longest compute."""
    found = {(rank, device): s for (rank, device, s), name in capture.streams.items() if name == STREAMS[MAIN]}
    gpu = capture.gpu[(capture.gpu["role"] == ROLE_CODE[Role.COMPUTE]) & (capture.gpu["kind"] != c.UPDATER_WORK)]
    lengths: dict[tuple[int, int, int], int] = {}
    distinct, group = distinct_rows([gpu["rank"], gpu["device"], gpu["stream"]])
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, group, gpu["end"] - gpu["start"])
    for (rank, device, stream), total in zip(distinct.tolist(), totals.tolist(), strict=True):
        lengths[rank, device, stream] = total
    for rank, device, stream in sorted(lengths, key=lambda key: (-lengths[key], key)):
        found.setdefault((rank, device), stream)
    return found
