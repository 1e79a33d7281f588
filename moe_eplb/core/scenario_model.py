"""A scenario: everything a run needs to be repeated, validated before anything starts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moe_eplb.core import scenario_rules
from moe_eplb.core.scenario_calls import CallStep, ExpectError
from moe_eplb.core.scenario_parts import Balancer, Checks, Model, Record, Section, Workload

__all__ = ["Scenario"]

StatisticsPath = Literal["gathered", "local_ids", "global_ids"]


class Scenario(Section):
    """One scenario file.

    `iterations` counts forward passes of the whole model; `timeout_s` bounds the run in seconds; `reorder_seed` picks a
    legal order of the work on auxiliary streams (None: from `seed`). `execution`: whether every forward is launched
    piece by piece, or captured into a CUDA graph and replayed, from the second of its size on. `share_gpus`: ranks
    may be more than GPUs; their collectives then go through host memory, with the same results, in another time.
    `moe_max_num_tokens` is the most tokens of all ranks that a MoE layer takes at once; more go in chunks, every other
    one on a stream of its own. `overlap`: whether the balancer's work runs beside the model's (``after``), between its
    work on one stream (``serial``), or as the reference once did it (``before``): beside it in graphs alone, counting
    the ids of all ranks once the all-gather has brought them. With `calls` the balancer's API is driven by that list
    instead of by a model.
    """

    name: str = Field(default="", max_length=100, pattern=r"^[A-Za-z0-9_.-]*$")
    description: str = ""
    ranks: int = Field(ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    iterations: int = Field(default=1, ge=1, le=1_000_000)
    timeout_s: float = Field(default=60.0, gt=0, le=86_400)
    device: Literal["cpu", "cuda"] = "cpu"
    execution: Literal["eager", "graph"] = "eager"
    share_gpus: bool = False
    model: Model
    dispatch: Literal["alltoall", "allgather", "symm_mem"] = "alltoall"
    moe_max_num_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    statistics: Literal["auto", "gathered", "local_ids", "global_ids"] = "auto"
    overlap: Literal["after", "before", "serial"] = "after"
    replica_choice: Literal["round_robin", "local_first"] = "round_robin"
    reorder_seed: int | None = Field(default=None, ge=0, lt=1 << 32)
    workload: Workload = Workload()
    balancer: Balancer | None = None
    calls: Annotated[tuple[CallStep, ...], Field(strict=False)] | None = None
    expect_error: ExpectError | None = None
    checks: Checks = Checks()
    record: Record = Record()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := scenario_rules.problems(self):
            raise PydanticCustomError("fits_together", "its parts do not fit together", {"problems": problems})
        return self

    @property
    def slots_per_rank(self) -> int:
        """Slots of each rank: as the balancer says, else the fewest that hold all experts."""
        if self.model.backend != "wide_ep":
            return self.model.experts
        if self.balancer is not None and self.balancer.slots_per_rank is not None:
            return self.balancer.slots_per_rank
        if self.balancer is not None and self.balancer.num_slots is not None:
            return self.balancer.num_slots // self.ranks
        return -(-self.model.experts // self.ranks)

    @property
    def slots(self) -> int:
        """P, the slots of all ranks together."""
        return self.slots_per_rank * self.ranks

    @property
    def statistics_path(self) -> StatisticsPath:
        """The statistics path with ``auto`` resolved: it follows the dispatch, and `overlap: before` knows but one.

        On GPUs an all-to-all knows all sizes and has no exchange in which counts could ride along.
        """
        if self.statistics != "auto":
            return self.statistics
        if self.overlap == "before":
            return "global_ids"
        return "gathered" if self.dispatch == "alltoall" and self.device == "cpu" else "local_ids"

    @property
    def fast_backend(self) -> str:
        """The backend of torch.distributed for the model's tensors and statistics; NCCL takes a GPU for each rank."""
        return "nccl" if self.device == "cuda" and not self.share_gpus else "gloo"

    @property
    def needs_all_ranks(self) -> bool:
        """Whether there may be no other rank beside those that run it: NVSHMEM makes its buffers on all of them."""
        return self.device == "cuda" and self.dispatch == "symm_mem" and self.ranks > 1

    @property
    def effective_reorder_seed(self) -> int:
        """Seed of the order of auxiliary work."""
        return self.seed if self.reorder_seed is None else self.reorder_seed

    @property
    def stream_seed(self) -> int | None:
        """That seed, None where everything runs on one stream."""
        return None if self.overlap == "serial" else self.effective_reorder_seed

    def sequences(self, rank: int) -> int:
        """Sequences that a rank works on at a time."""
        tokens = self.workload.tokens_per_rank
        return tokens if isinstance(tokens, int) else tokens[rank]

    def balancer_off_reason(self) -> str | None:
        """Why no expert will ever move in this run, or None when the balancer is on."""
        if self.model.backend != "wide_ep":
            return f"backend {self.model.backend!r} keeps every expert on every rank; only 'wide_ep' balances"
        if self.balancer is None:
            return "the scenario has no balancer section"
        if self.balancer.layer_updates_per_iter == 0:
            return "static routing: layer_updates_per_iter is 0"
        if self.ranks == 1 and self.calls is None and not self.balancer.alone:
            return "one rank: there is no other rank to balance with"
        return None
