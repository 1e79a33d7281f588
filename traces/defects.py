"""The good captures, and the bad ones: each a good one with one defect planted, and what must be said of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moe_eplb.core.events import KINDS, Kind
from traces.files import SUFFIX
from traces.job import ITERATIONS, Job, good_job, graph_job
from traces.play import LAYERS, PATHS, Step

__all__ = ["BAD", "GOOD", "Bad", "Good"]

LACKING = {"call_order": "unknown", "joins": "unknown", "times": "unknown"}
"""What else is unknown where something is missing."""
W, D, S, E = (
    Kind.START_WAIT_GPU_STAGE, Kind.DONE_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE, Kind.DONE_SET_CPU_STAGE,
)  # fmt: skip
LOCAL, GET, GATHERED = PATHS["A"]
(LOCAL_IDS,) = PATHS["B"]
(GLOBAL_IDS,) = PATHS["C"]


class Good(NamedTuple):
    """A trace without a defect."""

    form: str
    path: str = "B"
    syncs: bool = True
    tensorrt_llm: bool = False
    graph: bool = False
    static: bool = False
    """Experts stay where they are: no iterations, and calls that say so."""

    @property
    def name(self) -> str:
        """Its file's name."""
        words = [f"path_{self.path.lower()}", *(["no_waits"] if not self.syncs else [])]
        words += ["tensorrt_llm"] if self.tensorrt_llm else []
        words += ["graph"] if self.graph else []
        words += ["static"] if self.static else []
        return "_".join(words) + SUFFIX[self.form]

    def job(self) -> Job:
        """What it is a trace of; a file of the torch profiler holds one rank."""
        if self.graph:
            return graph_job(self.path)
        ranks = (0,) if self.form == "chrome" else (0, 1)
        job = good_job(self.path, ranks)
        job.syncs, job.tensorrt_llm = self.syncs, self.tensorrt_llm
        if self.static:
            for rank, steps in job.steps.items():
                job.steps[rank] = [replace(step, flags=3) for step in steps if step.layer >= 0]
        return job


@dataclass(frozen=True)
class Bad:
    """A good trace with a defect, and what must be said of it."""

    what: str
    twin: Good
    plant: Callable[[Job], None]
    check: str = "call_order"
    status: str = "invalid"
    code: str = ""
    also: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its file's name."""
        return "-".join(filter(None, (self.check, self.code, self.what))) + SUFFIX[self.twin.form]


GOOD = (
    *(Good(form, path) for form in SUFFIX for path in PATHS),
    Good("chrome", syncs=False), Good("nsys", syncs=False), Good("nsys", tensorrt_llm=True), Good("ours", static=True),
    Good("nsys", graph=True),
)  # fmt: skip
OURS, NSYS, CHROME = Good("ours"), Good("nsys"), Good("chrome")
TENSORRT_LLM, STATIC, GRAPH = Good("nsys", tensorrt_llm=True), Good("ours", static=True), Good("nsys", graph=True)


# -- rows of the protocol ----------------------------------------------------------------------------------------------


def _insert(
    kind: Kind, *, before: Kind | None = None, after: Kind | None = None, flags: int = 7, layer: int = 0
) -> Callable[[Job], None]:
    """One call too many in the middle of the job."""
    return lambda job: job.insert(Step(kind, layer, 1, flags), before, after)


def _change(kind: Kind, *, layer: int = 0, iteration: int = 1, **changes: object) -> Callable[[Job], None]:
    return lambda job: job.change(kind, layer, iteration, **changes)


def _without(kind: Kind, layer: int = 0) -> Callable[[Job], None]:
    """A call that nobody made; what it would have done is done."""
    return _change(kind, layer=layer, said=False)


def _skip_layer(job: Job) -> None:
    for rank, steps in job.steps.items():
        job.steps[rank] = [step for step in steps if (step.layer, step.iteration) != (LAYERS - 1, 1)]


def _swap_layers(job: Job) -> None:
    for rank, steps in job.steps.items():
        mine = [step for step in steps if step.iteration == 1 and step.layer >= 0]
        at = steps.index(mine[0])
        swapped = [step for layer in reversed(range(LAYERS)) for step in mine if step.layer == layer]
        job.steps[rank] = [*steps[:at], *swapped, *steps[at + len(mine) :]]


class _Row(NamedTuple):
    """A row of the table of calls; a wrong flag stands in our own trace alone, the others are shown by any format."""

    code: str
    what: str
    path: str
    plant: Callable[[Job], None]
    flagged: bool = False


def _rows() -> Iterator[_Row]:
    yield _Row("E102", "wait_ends_twice", "B", _insert(D, after=D))
    for path, kinds in PATHS.items():
        for kind in kinds:
            yield _Row("E103", f"{KINDS[kind].name}_before_the_wait_ends", path, _insert(kind, before=D))
    yield _Row("E103", "route_before_the_wait_ends", "B", _insert(Kind.ROUTE, before=D))
    for kind in (*PATHS["A"], GLOBAL_IDS):
        yield _Row("E104", f"{KINDS[kind].name}_on_path_b", "B", _insert(kind, after=LOCAL_IDS, flags=6))
    on_path_c = _insert(LOCAL_IDS, after=GLOBAL_IDS, flags=6)
    yield _Row("E104", "update_statistic_with_local_ids_on_path_c", "C", on_path_c)
    for path, kind in (("A", LOCAL), ("B", LOCAL_IDS), ("C", GLOBAL_IDS)):
        name, again = KINDS[kind].name, _insert(kind, after=kind, flags=6)
        yield _Row("E105", f"{name}_without_a_first_stage", path, _change(kind, flags=6), flagged=True)
        yield _Row("E106", f"{name}_after_the_last_stage", path, again, flagged=True)
    yield _Row("E107", "nothing_to_get", "A", _insert(GET, before=LOCAL))
    yield _Row("E108", "gathered_before_it_was_fetched", "A", _insert(GATHERED, before=GET))
    yield _Row("E109", "handed_over_twice", "B", _insert(S, after=S))
    yield _Row("E110", "handed_over_without_statistics", "B", _without(LOCAL_IDS))
    yield _Row("E111", "handed_over_before_the_sum", "A", _without(GATHERED))
    yield _Row("E111", "no_last_stage", "B", _change(LOCAL_IDS, flags=5), flagged=True)
    yield _Row("E112", "done_twice", "B", _insert(E, after=E))


def _rows_of_calls() -> Iterator[Bad]:
    """Each row of the table, the formats in turn."""
    # In dynamic routing the order of layers (E123) is broken before the layer's own.
    yield Bad("wait_begins_twice", STATIC, _insert(W, after=D, flags=3), code="E101")
    forms = itertools.cycle(SUFFIX)
    for row in _rows():
        form = "ours" if row.flagged else next(forms)
        yield Bad(row.what, Good(form, row.path), row.plant, code=row.code)


def _rows_of_iterations() -> Iterator[Bad]:
    start, end = Kind.START_ITER, Kind.END_ITER
    yield Bad("iteration_within_an_iteration", NSYS, _insert(start, after=start, layer=-1), code="E120")
    yield Bad("iteration_ends_twice", CHROME, _insert(end, after=end, layer=-1), code="E121")
    yield Bad("layer_outside_an_iteration", OURS, _insert(W, after=end), code="E122")
    yield Bad("layers_out_of_turn", NSYS, _swap_layers, code="E123")
    yield Bad("layer_twice", TENSORRT_LLM, _insert(W, after=E), code="E123")
    yield Bad("layer_left_out", CHROME, _skip_layer, code="E124")
    yield Bad("iteration_ends_within_a_layer", NSYS, _without(E, LAYERS - 1), code="E125")
    yield Bad("iteration_numbered_again", NSYS, _renumber(0), code="E126")
    yield Bad("iteration_numbered_ahead", OURS, _renumber(2), code="E126")


def _renumber(number: int) -> Callable[[Job], None]:
    """The second iteration starts under another number."""
    return lambda job: job.change(Kind.START_ITER, -1, 1, iteration=number)


# -- everything else ---------------------------------------------------------------------------------------------------


def _cut(kind: Kind, layer: int) -> Callable[[Job], None]:
    """The trace ends with a step of the last iteration."""

    def planted(job: Job) -> None:
        for rank, steps in job.steps.items():
            job.steps[rank] = steps[: job.find(rank, kind, layer, ITERATIONS - 1) + 1]

    return planted


def _leave_out(rank: int | None, iteration: int) -> Callable[[Job], None]:
    """An iteration is not there, on one rank or on all."""

    def planted(job: Job) -> None:
        for one, steps in job.steps.items():
            if rank in (None, one):
                job.steps[one] = [step for step in steps if step.iteration != iteration]

    return planted


def _begin_late(job: Job) -> None:
    for rank, steps in job.steps.items():
        job.steps[rank] = steps[job.find(rank, Kind.ROUTE, 1, 0) :]


def _set(**changes: object) -> Callable[[Job], None]:
    def planted(job: Job) -> None:
        for name, value in changes.items():
            setattr(job, name, value)

    return planted


def _late_wait(job: Job) -> None:
    """The balancer's wait is asked for and lasts long, and the main stream runs on."""
    job.change(W, 0, 1, lasts_us=60)
    job.change(D, 0, 1, holds=False)


def _replay_again(job: Job) -> None:
    for steps in job.steps.values():
        replay = next(step for step in steps if step.replays)
        steps.insert(steps.index(replay), replay)


def _missing_joins() -> Iterator[Bad]:
    for what, kind in (
        ("route_without_the_wait", D),
        ("statistics_without_the_top_k", LOCAL_IDS),
        ("hand_over_without_the_experts", S),
        ("next_layer_without_the_hand_over", E),
    ):
        yield Bad(what, NSYS, _change(kind, waits=False), check="joins")
    yield Bad("route_without_the_wait", CHROME, _change(D, waits=False), check="joins")
    yield Bad("tensorrt_llm_route_without_the_wait", TENSORRT_LLM, _change(D, waits=False), check="joins")
    yield Bad("the_device_saw_no_wait", OURS, _set(unordered=True), check="joins")


def _lacking() -> Iterator[Bad]:
    loss = "CUPTI buffers overflowed: 12 events were dropped"
    for what, twin, planted in (
        ("dropped_records", OURS, _set(dropped=3)),
        ("log_not_closed", OURS, _set(closed=False)),
        ("record_taken_out", OURS, _set(lost_record=True)),
        ("profiler_dropped_events", NSYS, _set(diagnostic=loss)),
        ("kernel_lost", CHROME, _set(lost_kernel=True)),
        ("hole", NSYS, _leave_out(None, 1)),
        ("iteration_missing_on_a_rank", NSYS, _leave_out(1, ITERATIONS - 1)),
        ("iteration_never_ends", NSYS, _cut(E, LAYERS - 1)),
        ("layer_cut_off", OURS, _cut(S, LAYERS - 1)),
        ("begins_within_an_iteration", CHROME, _begin_late),
        ("range_never_closed", NSYS, _change(Kind.ROUTE, closes=False)),
        ("rank_missing", NSYS, lambda job: job.steps.update({2: job.steps.pop(1)})),
    ):
        yield Bad(what, twin, planted, check="complete", status="unknown", also=LACKING)


_SPINS = "moeWaitSignalForGpuStageKernel(Signal*, int*)"
BAD: tuple[Bad, ...] = (
    *_rows_of_calls(),
    *_rows_of_iterations(),
    *_missing_joins(),
    Bad("route_before_the_wait_ended", NSYS, _late_wait, check="times"),
    Bad("route_before_the_wait_ended", OURS, _late_wait, check="times"),
    *_lacking(),
    Bad("replay_without_an_iteration", GRAPH, _replay_again, check="graph_order"),
    Bad("replay_without_the_hand_over", GRAPH, _set(lost_hand_over=True), check="graph_order"),
    Bad("ranks_apart", NSYS, _set(shift_us={1: 500}), check="clocks"),
    Bad("ranks_apart", OURS, _set(shift_us={1: -500}), check="clocks"),
    Bad("wait_within_the_experts", NSYS, _change(Kind.EXPERTS, extra=_SPINS), check="waits_not_work"),
)
