"""The three ways in which a layer's token counts reach the balancer; each iteration uses exactly one.

A, "gathered": local counts ride in the prepare exchange of an all-to-all dispatch.
B, "local_ids": the balancer sums local counts over the ranks by itself.
C, "global_ids": an all-gather dispatch brings the expert ids of all ranks.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from moe_eplb.balancer import AllReduce
from moe_eplb.core.errors import BalancerError
from moe_eplb.moe.chunking import Chunk
from moe_eplb.moe.dispatch import Received
from moe_eplb.moe.stages import LayerStages

__all__ = ["DispatchName", "StatisticsName", "StatisticsPath", "choose_path", "make_path"]

DispatchName = Literal["alltoall", "allgather", "symm_mem"]
StatisticsName = Literal["gathered", "local_ids", "global_ids"]


def choose_path(dispatch: DispatchName, statistics: StatisticsName | None) -> StatisticsName:
    """The statistics path for a dispatch; by default all-to-all gathers and the others give local ids.

    Raises:
        BalancerError: E154 when the dispatch cannot carry the path.
    """
    chosen = statistics or ("gathered" if dispatch == "alltoall" else "local_ids")
    carrier = {"gathered": "alltoall", "global_ids": "allgather"}.get(chosen, dispatch)
    if carrier != dispatch:
        raise BalancerError(
            "E154",
            f"statistics {chosen!r} cannot ride in dispatch {dispatch!r}",
            why=f"only {carrier!r} carries them",
            hint=f"use dispatch {carrier!r} or statistics 'local_ids'",
        )
    return chosen


class StatisticsPath(Protocol):
    """Hooks of a chunk, in the order of their calls.

    `carries_agreement`: the vote on a plan rides in the last chunk's prepare exchange, for want of a sum of its own.
    """

    carries_agreement: bool

    def after_top_k(self, ids: Tensor, chunk: Chunk) -> None:
        """Expert ids int32 [T, K] of this rank's chunk are known."""

    def local_counts(self, chunk: Chunk) -> Tensor | None:
        """int32 [E] of all chunks so far, to ride in the last chunk's prepare exchange; None elsewhere."""

    def after_dispatch(self, received: Received, chunk: Chunk) -> None:
        """Rows of other ranks are here."""


class GatheredPath:
    """Path A."""

    carries_agreement = True

    def __init__(self, stages: LayerStages) -> None:
        self._stages = stages

    def after_top_k(self, ids: Tensor, chunk: Chunk) -> None:
        """Count on the balancer stream."""
        self._stages.update_local_statistic(ids, is_first_stage=chunk.first, is_last_stage=chunk.last)

    def local_counts(self, chunk: Chunk) -> Tensor | None:
        """The counts of this rank, None in static routing."""
        return self._stages.get_local_statistic_tensor() if chunk.last else None

    def after_dispatch(self, received: Received, chunk: Chunk) -> None:
        return None


class LocalIdsPath:
    """Path B; `allreduce` is None where no sum over ranks is needed."""

    carries_agreement = False

    def __init__(self, stages: LayerStages, allreduce: AllReduce | None) -> None:
        self._stages = stages
        self._allreduce = allreduce

    def after_top_k(self, ids: Tensor, chunk: Chunk) -> None:
        """Count, and reduce with the last chunk, on the balancer stream; a whole forward's may wait for the experts.

        It is whole on every rank, since all make equally many chunks.
        """
        if chunk.first and chunk.last:
            self._stages.hold_statistics()
        self._stages.update_statistic_with_local_ids(
            ids, is_first_stage=chunk.first, is_last_stage=chunk.last, allreduce=self._allreduce
        )

    def local_counts(self, chunk: Chunk) -> Tensor | None:
        return None

    def after_dispatch(self, received: Received, chunk: Chunk) -> None:
        return None


class GlobalIdsPath:
    """Path C."""

    carries_agreement = True

    def __init__(self, stages: LayerStages) -> None:
        self._stages = stages

    def after_top_k(self, ids: Tensor, chunk: Chunk) -> None:
        return None

    def local_counts(self, chunk: Chunk) -> Tensor | None:
        return None

    def after_dispatch(self, received: Received, chunk: Chunk) -> None:
        """Count the ids of all ranks on the balancer stream."""
        assert received.expert_ids is not None, "the dispatch was built without gather_ids"
        self._stages.update_statistic_with_global_ids(
            received.expert_ids, is_first_stage=chunk.first, is_last_stage=chunk.last
        )


def make_path(name: StatisticsName, stages: LayerStages, allreduce: AllReduce | None) -> StatisticsPath:
    """The path called `name`; only "local_ids" uses `allreduce`."""
    if name == "gathered":
        return GatheredPath(stages)
    if name == "global_ids":
        return GlobalIdsPath(stages)
    return LocalIdsPath(stages, allreduce)
