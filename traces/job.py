"""A made-up job, small and exact: the steps of each rank, and what is wrong with the trace of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from moe_eplb.core.events import Kind
from traces.play import LAYERS, PATHS, Played, Step, play

__all__ = ["ITERATIONS", "Job", "good_job", "graph_job"]

ITERATIONS = 3


@dataclass
class Job:
    """Steps by rank, and what is wrong with the trace of it."""

    steps: dict[int, list[Step]]
    shift_us: dict[int, int] = field(default_factory=dict)
    """How far a rank's clock is off."""
    dropped: int = 0
    closed: bool = True
    lost_record: bool = False
    """A record was taken out of the file."""
    lost_kernel: bool = False
    diagnostic: str = ""
    unordered: bool = False
    """The device notes that the first route did not wait."""
    syncs: bool = True
    """Whether waits between streams are recorded."""
    lost_hand_over: bool = False
    """The last replay has no hand-over."""
    tensorrt_llm: bool = False
    """Calls have the names that TensorRT-LLM gives them, and kernels its kernels' names."""

    def find(self, rank: int, kind: Kind, layer: int, iteration: int) -> int:
        """Where a step stands that is not planted."""
        steps = self.steps[rank]
        return next(
            n for n, s in enumerate(steps) if (s.kind, s.layer, s.iteration) == (kind, layer, iteration) and s.works
        )

    def change(self, kind: Kind, layer: int, iteration: int, /, **changes: object) -> None:
        """Change a step on every rank."""
        for rank, steps in self.steps.items():
            at = self.find(rank, kind, layer, iteration)
            steps[at] = replace(steps[at], **changes)  # type: ignore[arg-type]

    def insert(self, planted: Step, before: Kind | None = None, after: Kind | None = None) -> None:
        """Put a call that does nothing before or after another one of its layer (or of all) and iteration."""
        for rank, steps in self.steps.items():
            anchor = before if before is not None else after
            assert anchor is not None
            layer = -1 if anchor >= Kind.START_ITER and anchor <= Kind.ABORT_ITER else planted.layer
            at = self.find(rank, anchor, layer, planted.iteration) + (before is None)
            steps.insert(at, replace(planted, works=False))

    def play(self) -> list[Played]:
        """All ranks."""
        return [play(rank, steps, self.shift_us.get(rank, 0)) for rank, steps in sorted(self.steps.items())]


def good_job(path: str = "B", ranks: tuple[int, ...] = (0, 1)) -> Job:
    """A job without a defect; `path` is that of its statistics."""
    return Job({rank: list(_steps(path)) for rank in ranks})


def graph_job(path: str = "B") -> Job:
    """A job whose first iteration captures a graph, which is replayed once for it and once in every other one."""
    steps = [replace(s, captured=s.layer >= 0) for s in _steps(path) if s.layer < 0 or s.iteration == 0]
    replay = Step(Kind.STEP, said=False, replays=True)
    for iteration in range(ITERATIONS):
        at = next(n for n, s in enumerate(steps) if (s.kind, s.iteration) == (Kind.END_ITER, iteration))
        steps.insert(at + (iteration == 0), replace(replay, iteration=iteration))
    return Job({rank: list(steps) for rank in (0, 1)})


def _steps(path: str) -> Iterator[Step]:
    for iteration in range(ITERATIONS):
        yield Step(Kind.START_ITER, -1, iteration, flags=3)
        for layer in range(LAYERS):
            yield from layer_steps(path, layer, iteration)
        yield Step(Kind.END_ITER, -1, iteration, flags=0)


def layer_steps(path: str, layer: int, iteration: int) -> list[Step]:
    """One layer of an iteration."""
    kinds = (
        Kind.START_WAIT_GPU_STAGE, Kind.TOPK, Kind.DONE_WAIT_GPU_STAGE, *PATHS[path], Kind.ROUTE, Kind.PREPARE,
        Kind.DISPATCH, Kind.EXPERTS, Kind.START_SET_CPU_STAGE, Kind.COMBINE, Kind.DONE_SET_CPU_STAGE,
    )  # fmt: skip
    return [Step(kind, layer, iteration) for kind in kinds]
