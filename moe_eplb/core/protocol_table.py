"""States, calls and the table of what each call needs. `moe_eplb.core.protocol` turns it into steps."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["INITIAL", "PATH_OF", "TABLE", "Call", "Given", "Illegal", "LayerState", "Path", "Phase", "Row"]


class Call(enum.IntEnum):
    """The ten calls of a layer, whose counts start from zero in every iteration."""

    __hash__ = int.__hash__  # an enumeration's own hash is Python code, and steps are looked up by it

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


class Phase(enum.IntEnum):
    """Who may touch a layer's weights: nobody yet, the device after the wait, the CPU after the hand-over."""

    __hash__ = int.__hash__

    IDLE = 0
    WAITING = 1
    OWNED = 2
    RELEASING = 3


class Path(enum.Enum):
    """The three ways of statistics."""

    __hash__ = object.__hash__

    GATHERED = "A (local counts, gathered)"
    LOCAL_IDS = "B (local ids, summed)"
    GLOBAL_IDS = "C (global ids)"


PATH_OF: dict[Call, Path] = {
    Call.UPDATE_LOCAL_STATISTIC: Path.GATHERED,
    Call.GET_LOCAL_STATISTIC_TENSOR: Path.GATHERED,
    Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC: Path.GATHERED,
    Call.UPDATE_STATISTIC_WITH_LOCAL_IDS: Path.LOCAL_IDS,
    Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS: Path.GLOBAL_IDS,
}


class LayerState(NamedTuple):
    """A layer within an iteration.

    `counts`: the ten calls' counts. `given`: statistics were given. `reduced`: they were summed over the ranks.
    `complete`: their last stage was given. `path`: the path in use. `fetched`: local counts were handed out
    after the last stage.
    """

    phase: Phase
    counts: tuple[int, ...]
    given: bool = False
    reduced: bool = False
    complete: bool = False
    path: Path | None = None
    fetched: bool = False


INITIAL = LayerState(Phase.IDLE, (0,) * len(Call))


class Given(NamedTuple):
    """What a row of the table may look at."""

    state: LayerState
    dynamic: bool
    first: bool
    last: bool

    def count(self, call: Call) -> int:
        """How often a call was made in this iteration."""
        return self.state.counts[call]

    def without(self, phase: Phase) -> bool:
        """Whether the layer is in another phase."""
        return self.state.phase is not phase

    def mixes(self, path: Path) -> bool:
        """Whether another path than `path` is in use."""
        return self.state.path is not None and self.state.path is not path


class Row(NamedTuple):
    """One thing that a call needs: the code and the words for when it is missing, and how to tell."""

    code: str
    needs: str
    reason: str
    hint: str
    broken: Callable[[Given], bool]


class Illegal(Exception):
    """A call that the table forbids. `protocol.violation` makes it an error for users."""

    def __init__(self, state: LayerState, call: Call, row: Row, legal: tuple[Call, ...]) -> None:
        super().__init__(f"{call.name.lower()}: {row.reason}")
        self.code, self.reason, self.hint = row.code, row.reason, row.hint
        self.call_name = call.name.lower()
        self.state_text = _describe(state)
        self.legal = tuple(c.name.lower() for c in legal)


def _describe(state: LayerState) -> str:
    counts = ", ".join(f"{call.name.lower()} {state.counts[call]}" for call in Call if state.counts[call])
    path = f", statistics path {state.path.value}" if state.path else ""
    return f"{state.phase.name}{path}, calls so far: {counts or 'none'}"


_FIRST_WAIT = (
    "call start_wait_gpu_stage and done_wait_gpu_stage first; a chunk on another stream must join the wait too"
)
_ONE_PATH = "use one of: update_local_statistic with the gathered update, ..._with_local_ids, ..._with_global_ids"

_IN_OWNED = Row(
    "E103", "phase OWNED", "the layer is not held: its wait is not done, or it was handed over",
    _FIRST_WAIT, lambda g: g.without(Phase.OWNED),
)  # fmt: skip


_HELD_IF_DYNAMIC = _IN_OWNED._replace(
    needs="phase OWNED, in dynamic routing", broken=lambda g: g.dynamic and g.without(Phase.OWNED)
)


def _only(path: Path) -> Row:
    return Row(
        "E104", "no other statistics path in this iteration", "two statistics paths in one iteration",
        _ONE_PATH, lambda g: g.mixes(path),
    )  # fmt: skip


_FIRST_STAGE = Row(
    "E105", "is_first_stage on the first statistics call of the iteration and on no other",
    "is_first_stage must be true on the iteration's first statistics call and on no other, since it zeroes the counts",
    "pass is_first_stage=(chunk == 0 and repeat == 0)", lambda g: g.first == g.state.given,
)  # fmt: skip
_NOT_COMPLETE = Row(
    "E106", "no last stage so far", "statistics after the last stage",
    "pass is_last_stage=True on the last chunk of the last repeat only", lambda g: g.state.complete,
)  # fmt: skip

TABLE: dict[Call, tuple[Row, ...]] = {
    Call.START_WAIT_GPU_STAGE: (
        Row(
            "E101", "phase IDLE", "the layer's stage has already begun in this iteration",
            "one wait and one hand-over an iteration; chunks and repeats share them", lambda g: g.without(Phase.IDLE),
        ),
    ),
    Call.DONE_WAIT_GPU_STAGE: (
        Row(
            "E102", "phase WAITING", "there is no wait to be done with",
            "call start_wait_gpu_stage once before it", lambda g: g.without(Phase.WAITING),
        ),
    ),
    Call.UPDATE_LOCAL_STATISTIC: (_IN_OWNED, _only(Path.GATHERED), _FIRST_STAGE, _NOT_COMPLETE),
    Call.GET_LOCAL_STATISTIC_TENSOR: (
        _IN_OWNED,
        _only(Path.GATHERED),
        Row(
            "E107", "update_local_statistic > 0", "there are no local statistics to get",
            "call update_local_statistic first", lambda g: g.count(Call.UPDATE_LOCAL_STATISTIC) == 0,
        ),
    ),
    Call.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC: (
        _IN_OWNED,
        _only(Path.GATHERED),
        Row(
            "E108", "get_local_statistic_tensor > 0 after the last stage, not reduced yet",
            "the gathered statistics cannot be those of this iteration",
            "gather what get_local_statistic_tensor gives after the last stage, and update once",
            lambda g: not g.state.fetched or g.state.reduced,
        ),
    ),
    Call.UPDATE_STATISTIC_WITH_LOCAL_IDS: (_IN_OWNED, _only(Path.LOCAL_IDS), _FIRST_STAGE, _NOT_COMPLETE),
    Call.UPDATE_STATISTIC_WITH_GLOBAL_IDS: (_IN_OWNED, _only(Path.GLOBAL_IDS), _FIRST_STAGE, _NOT_COMPLETE),
    Call.ROUTE: (_HELD_IF_DYNAMIC,),
    Call.START_SET_CPU_STAGE: (
        Row(
            "E109", "phase OWNED", "the layer is not held, so it cannot be handed over",
            "hand over once, after the wait and after the experts were computed", lambda g: g.without(Phase.OWNED),
        ),
        Row(
            "E110", "statistics given, in dynamic routing", "no statistics were given in this iteration",
            "count the chosen experts on one of the three paths, also when nobody will use the counts",
            lambda g: g.dynamic and not g.state.given,
        ),
        Row(
            "E111", "statistics reduced, in dynamic routing", "statistics were given but never reduced",
            "pass is_last_stage=True on the last chunk, and on path A call update_statistic_with_gathered_statistic",
            lambda g: g.dynamic and not g.state.reduced,
        ),
    ),
    Call.DONE_SET_CPU_STAGE: (
        Row(
            "E112", "phase RELEASING", "there is no hand-over to be done with",
            "call start_set_cpu_stage once before it", lambda g: g.without(Phase.RELEASING),
        ),
    ),
}  # fmt: skip
"""For each call, what it needs, in the order of checking."""
