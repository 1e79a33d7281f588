"""The closed vocabulary of what a run can record, and the sink that the running half writes to.

One name per kind is used in NVTX ranges, traces, tables and timelines. The running half knows only `EventSink`;
`moe_eplb.session` connects it to `moe_eplb.recording`.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

import numpy as np

__all__ = [
    "CAPTURED",
    "DEVICE_STAGES",
    "HOST",
    "KINDS",
    "RECORD",
    "ROUTE_COUNTS",
    "STREAMS",
    "UPDATER",
    "EventSink",
    "Kind",
    "KindInfo",
    "NullSink",
    "Role",
    "by_name",
]

CAPTURED = -2
"""Iteration of what was called while a graph was captured: nothing of it ran then."""
HOST = 255
"""Stream number of a call made by the host (an API call), as against the work it put on a stream."""
UPDATER = 254
"""Stream number of work done by the balancer's updater thread."""
STREAMS = ("Main", "Attention", "MoeShared", "MoeChunkingOverlap", "MoeBalancer", "MoeBalancerStatistic")
"""Names of the device's streams; the position is the stream's number. Only `overlap: before` uses the last."""

DEVICE_STAGES = ("take over", "vote", "fold", "hand over")
"""What a device that holds the balancer's state writes down of each layer; the position is the stage's number."""


class Role(enum.StrEnum):
    """What a stretch of device time is. Waiting is not work; unknown never counts as compute."""

    COMPUTE = "compute"
    COMM = "comm"
    COMM_WAIT = "comm_wait"
    EPLB_WAIT = "eplb_wait"
    EPLB_STATISTIC = "eplb_statistic"
    EPLB_ALLREDUCE = "eplb_allreduce"
    EPLB_MIGRATE = "eplb_migrate"
    EPLB_SIGNAL = "eplb_signal"
    MEMCPY = "memcpy"
    OTHER = "other"
    UNKNOWN = "unknown"


class Kind(enum.IntEnum):
    """Every kind of record. 0 to 9 are the stage calls in the order of `moe_eplb.core.protocol.Call`."""

    __hash__ = int.__hash__  # an enumeration's own hash is Python code, and kinds are looked up for every record

    START_WAIT_GPU_STAGE = 0
    DONE_WAIT_GPU_STAGE = 1
    UPDATE_LOCAL_STATISTIC = 2
    GET_LOCAL_STATISTIC_TENSOR = 3
    UPDATE_STATISTIC_WITH_GATHERED_STATISTIC = 4
    UPDATE_STATISTIC_WITH_LOCAL_IDS = 5
    UPDATE_STATISTIC_WITH_GLOBAL_IDS = 6
    ROUTE = 7
    START_SET_CPU_STAGE = 8
    DONE_SET_CPU_STAGE = 9
    START_ITER = 10
    END_ITER = 11
    ABORT_ITER = 12
    STATISTIC_REDUCE = 20
    LOAD_UPDATE = 21
    PLAN = 22
    STAGE_WEIGHTS = 23
    COMMIT = 24
    PLAN_DROPPED = 25
    VOTE = 26
    SETTLE_VOTE = 27
    TOPK = 30
    PREPARE = 31
    DISPATCH = 32
    EXPERTS = 33
    COMBINE = 34
    SHARED_EXPERT = 35
    STEP = 40
    CHECK = 41
    UNORDERED = 42
    CAPTURE = 43
    REPLAY = 44
    DEVICE_STAGE = 45


class KindInfo(NamedTuple):
    """Name in traces, role of device records of this kind, and what the two payload numbers mean."""

    name: str
    role: Role
    a: str = ""
    b: str = ""


# Payloads of the stage calls: `a` bit 0 = is_first_stage, bit 1 = is_last_stage, bit 2 = layer has dynamic routing.
_FLAGS = "flags: 1 first, 2 last, 4 dynamic"
ROUTE_COUNTS = 8
"""Payload `a` of a route on a device that counts the ids for the statistics, too."""

ALL_LAYERS = 1
"""Payload `a` of a vote that takes the counts of all layers along."""
VOTES = 2
"""Payload `a` of a load update that is the vote, too, since there is nothing to be summed over ranks in between."""

KINDS: dict[Kind, KindInfo] = {
    Kind.START_WAIT_GPU_STAGE: KindInfo("start_wait_gpu_stage", Role.EPLB_WAIT, _FLAGS),
    Kind.DONE_WAIT_GPU_STAGE: KindInfo("done_wait_gpu_stage", Role.EPLB_WAIT, _FLAGS),
    Kind.UPDATE_LOCAL_STATISTIC: KindInfo("update_local_statistic", Role.EPLB_STATISTIC, _FLAGS),
    Kind.GET_LOCAL_STATISTIC_TENSOR: KindInfo("get_local_statistic_tensor", Role.EPLB_WAIT, _FLAGS),
    Kind.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC: KindInfo(
        "update_statistic_with_gathered_statistic", Role.EPLB_STATISTIC, _FLAGS
    ),
    Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS: KindInfo("update_statistic_with_local_ids", Role.EPLB_STATISTIC, _FLAGS),
    Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS: KindInfo("update_statistic_with_global_ids", Role.EPLB_STATISTIC, _FLAGS),
    Kind.ROUTE: KindInfo("route", Role.COMPUTE, f"{_FLAGS}, 8 counts the ids too", "placement version"),
    Kind.START_SET_CPU_STAGE: KindInfo("start_set_cpu_stage", Role.EPLB_SIGNAL, _FLAGS),
    Kind.DONE_SET_CPU_STAGE: KindInfo("done_set_cpu_stage", Role.EPLB_SIGNAL, _FLAGS),
    Kind.START_ITER: KindInfo("start_iter", Role.OTHER, "1 statistics, 2 weight updates"),
    Kind.END_ITER: KindInfo("end_iter", Role.OTHER),
    Kind.ABORT_ITER: KindInfo("abort_iter", Role.OTHER),
    Kind.STATISTIC_REDUCE: KindInfo("statistic_reduce", Role.EPLB_ALLREDUCE, "bytes"),
    Kind.LOAD_UPDATE: KindInfo("load_update", Role.EPLB_STATISTIC, "1 of all layers, 2 votes too"),
    Kind.PLAN: KindInfo("plan", Role.OTHER, "changed slots", "digest"),
    Kind.STAGE_WEIGHTS: KindInfo("stage_weights", Role.EPLB_MIGRATE, "bytes", "slots"),
    Kind.COMMIT: KindInfo("commit", Role.EPLB_MIGRATE, "changed slots", "digest"),
    Kind.PLAN_DROPPED: KindInfo("plan_dropped", Role.OTHER, "ready ranks", "1 digests differ"),
    Kind.VOTE: KindInfo("vote", Role.EPLB_WAIT, "1 of all layers"),
    Kind.SETTLE_VOTE: KindInfo("settle_vote", Role.EPLB_SIGNAL),
    Kind.TOPK: KindInfo("topk", Role.COMPUTE, "tokens"),
    Kind.PREPARE: KindInfo("prepare", Role.COMM, "bytes"),
    Kind.DISPATCH: KindInfo("dispatch", Role.COMM, "bytes"),
    Kind.EXPERTS: KindInfo("experts", Role.COMPUTE, "entries"),
    Kind.COMBINE: KindInfo("combine", Role.COMM, "bytes"),
    Kind.SHARED_EXPERT: KindInfo("shared_expert", Role.COMPUTE, "tokens"),
    Kind.STEP: KindInfo("step", Role.OTHER, "tokens"),
    Kind.CHECK: KindInfo("check", Role.OTHER),
    Kind.UNORDERED: KindInfo("unordered", Role.OTHER, "kind", "kind << 8 | stream it did not wait for"),
    Kind.CAPTURE: KindInfo("capture", Role.OTHER, "graph"),
    Kind.REPLAY: KindInfo("replay", Role.OTHER, "graph"),
    # Written down by the device itself when it did that stage; `iteration` is the one that it read.
    Kind.DEVICE_STAGE: KindInfo("device_stage", Role.OTHER, "0 take over, 1 vote, 2 fold, 3 hand over"),
}

_BY_NAME = {info.name: kind for kind, info in KINDS.items()}


def by_name(name: str) -> Kind | None:
    """The kind with this trace name, or None."""
    return _BY_NAME.get(name)


RECORD = np.dtype(
    [
        ("start", "<i8"),  # ns, CLOCK_MONOTONIC of this host (time.perf_counter_ns on Linux)
        ("end", "<i8"),  # ns; 0 while open, equal to start for a mark
        ("kind", "<u2"),
        ("stream", "<u2"),  # HOST, UPDATER, 0 = main, n = n-th AuxStreamType + 1
        ("layer", "<i4"),  # -1 when the record belongs to no layer
        ("iteration", "<i4"),
        ("thread", "<u4"),
        ("a", "<i8"),
        ("b", "<i8"),
    ]
)
"""One record of a rank's event log, 48 bytes, in the order in which ranges were opened."""


class EventSink(Protocol):
    """Where the running half reports to. Calls come from the model's thread and from the updater's."""

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        """Open a range and return its token."""

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        """Close a range; payloads that were not known at its start may be given now."""

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        """Record a moment."""

    def place(self, token: int, start: int, end: int) -> None:
        """Say when a range that was closed really ran, on a device that does its work later; ns of the host's clock."""

    def record(
        self, kind: Kind, layer: int, iteration: int, stream: int, start: int, end: int, a: int = 0, b: int = 0
    ) -> None:
        """Add work that a device did on its own, as in the replay of a graph, with its times as in `place`.

        The host did nothing of the kind then, so that no range of a host's thread tells of it.
        """


class NullSink:
    """A sink that keeps nothing, for library use without a recorder."""

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        return 0

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        return None

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        return None

    def place(self, token: int, start: int, end: int) -> None:
        return None

    def record(
        self, kind: Kind, layer: int, iteration: int, stream: int, start: int, end: int, a: int = 0, b: int = 0
    ) -> None:
        return None
