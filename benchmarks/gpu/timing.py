"""Times of captured work on a GPU, variants in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["Graphs", "ceilings", "time_in_turns", "time_without_pause", "told"]

_WARM_UP = 3


class Graphs:
    """One variant captured once for each of several input sets; replays take the sets in turn.

    Args:
        work: The same work on each set.
        pool: Memory that all graphs of a case share, because no two of them run at once.
    """

    def __init__(self, work: Sequence[Callable[[], object]], pool: tuple[int, int]) -> None:
        self._graphs = [self._capture(do, pool) for do in work]
        self._next = 0

    def _capture(self, do: Callable[[], object], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                do()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            do()
        return graph

    def replay(self) -> None:
        """Enqueue the work on the next set."""
        self._graphs[self._next].replay()
        self._next = (self._next + 1) % len(self._graphs)


def time_in_turns(variants: Mapping[str, Callable[[], object]], replays: int) -> dict[str, list[float]]:
    """Milliseconds of `replays` runs of each variant, in the order A B B A, so that what drifts meets all alike.

    A round is enqueued as a whole, so that the GPU does not wait for the host inside of it.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    torch.cuda.synchronize()
    names = list(variants)
    for _ in range(-(-replays // 2)):
        round_of = [*names, *reversed(names)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(round_of) + 1)]
        marks[0].record()
        for name, mark in zip(round_of, marks[1:], strict=True):
            variants[name]()
            mark.record()
        marks[-1].synchronize()
        for name, begin, end in zip(round_of, marks[:-1], marks[1:], strict=True):
            samples[name].append(begin.elapsed_time(end))
    return {name: found[:replays] for name, found in samples.items()}


def time_without_pause(
    variants: Mapping[str, Callable[[], None]], replays: int, block: int = 9
) -> dict[str, list[float]]:
    """Milliseconds of `replays` runs of each variant, enqueued faster than the GPU does them, in blocks A B B A.

    The queue never runs empty, so that what a variant enqueues before and after its graph counts, and nothing else. The
    first run of a block is left out: it pays for the change from one graph to another.
    """
    names, rounds = list(variants), -(-replays // (2 * (block - 1)))
    order = [name for name in [*names, *reversed(names)] * (1 + rounds) for _ in range(block)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
    marks[0].record()
    for name, mark in zip(order, marks[1:], strict=True):
        variants[name]()
        mark.record()
    torch.cuda.current_stream().synchronize()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    fill = 2 * len(names) * block
    for place, name in list(enumerate(order))[fill:]:
        if place % block:
            samples[name].append(marks[place].elapsed_time(marks[place + 1]))
    return samples


def ceilings(replays: int = 60) -> dict[str, float]:
    """What this GPU reaches now: a bf16 product of 8192^3 (TFLOP/s) and a copy of 2 GiB (TB/s, read and written)."""
    size, elements = 8192, 2**30
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(elements, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    times = time_in_turns(
        {"gemm": lambda: _discard(torch.mm(a, b, out=product)), "copy": lambda: _discard(target.copy_(source))}, replays
    )
    middle = {name: sorted(found)[len(found) // 2] / 1e3 for name, found in times.items()}
    return {
        "gemm_8192_bf16_tflops": 2 * size**3 / middle["gemm"] / 1e12,
        "copy_tb_per_s": 2 * 2 * elements / middle["copy"] / 1e12,
    }


def told(limits: Mapping[str, float]) -> str:
    """`ceilings` in a line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in limits.items())


def _discard(result: object) -> None:
    del result
