"""The sections of a scenario. What must hold between them is in `scenario_rules`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from moe_eplb.core.thresholds import Threshold, parse_all

__all__ = ["Balancer", "Checks", "Model", "Record", "Routing", "Section", "Workload"]

Count = Annotated[int, Field(ge=1, le=1 << 20)]
Tokens = Annotated[int, Field(ge=0, le=1 << 20)]


def _list_or_number(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


# A tag decides which of the two was meant, so that an error speaks of that one alone.
TokensPerRank = Annotated[
    Annotated[Tokens, Tag("number")] | Annotated[tuple[Tokens, ...], Field(strict=False), Tag("list")],
    Discriminator(_list_or_number),
]
Assignment = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]


class Section(BaseModel):
    """Frozen, strict, and without room for keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Routing(Section):
    """How the router chooses experts. `groups` and `top_groups` belong to ``deepseek_v3``."""

    method: Literal["default", "renormalize", "deepseek_v3"] = "renormalize"
    groups: Count = 1
    top_groups: Count = 1
    scale: float = Field(default=1.0, gt=0)


class Model(Section):
    """A stack of `layers` MoE layers: E `experts`, K `top_k`, D `hidden`, I `intermediate`."""

    layers: int = Field(ge=1, le=4096)
    experts: int = Field(ge=1, le=1024)
    top_k: int = Field(ge=1, le=64)
    hidden: int = Field(default=64, ge=1, le=1 << 16)
    intermediate: int = Field(default=32, ge=1, le=1 << 16)
    dtype: Literal["float32", "bfloat16"] = "float32"
    backend: Literal["wide_ep", "grouped", "fused"] = "wide_ep"
    routing: Routing = Routing()


class Workload(Section):
    """Which experts the tokens ask for.

    ``uniform``: all alike. ``zipf``: the n-th hottest expert has weight n**-skew. ``hot``: `hot_experts` of them share
    `hot_share` of the probability. ``model``: the router's own choice. ``recorded``: from the file at `path`.
    `drift_every`: iterations after which zipf and hot pick other experts as the hot ones, 0 for never.
    `order`: the tokens of a recorded file as they stand, or by position so that its sequences decode side by side.
    """

    kind: Literal["uniform", "zipf", "hot", "model", "recorded"] = "uniform"
    tokens_per_rank: TokensPerRank = 64
    skew: float = Field(default=1.0, ge=0, le=16)
    hot_experts: Count = 1
    hot_share: float = Field(default=0.5, gt=0, le=1)
    drift_every: int = Field(default=0, ge=0, le=1 << 20)
    path: str | None = None
    order: Literal["file", "position"] = "file"


class Balancer(Section):
    """The online balancer. Slots are given as `num_slots` (P) or `slots_per_rank` (P / R), or come from `config`.

    `layer_updates_per_iter` 0 is static routing. `empty_group`: whether the update cycle ends with an iteration that
    updates nothing where the published rule has one. `commit_delay`: iterations from an update's start to its commit.
    `window` and `decay`: how statistics add up. `warm_up`: first iterations that move nothing. `update_timeout_s`:
    seconds that a commit is waited for. `config`: path of a TensorRT-LLM balancer file to take the placement from.
    """

    num_slots: Count | None = None
    slots_per_rank: Count | None = None
    layer_updates_per_iter: int = Field(default=0, ge=0, le=4096)
    empty_group: Literal["reference", "never"] = "reference"
    commit_delay: int = Field(default=1, ge=1, le=64)
    decay: float = Field(default=0.95, ge=0, le=1)
    window: int = Field(default=1, ge=1, le=1024)
    warm_up: int = Field(default=0, ge=0, le=1 << 20)
    preserve_slots: bool = True
    initial_global_assignments: dict[int, Assignment] | None = None
    update_timeout_s: float = Field(default=5.0, gt=0, le=3600)
    config: str | None = None


class Checks(Section):
    """What is proved on the run. `thresholds` maps a metric to ``[agg] op number``."""

    exactly_once: bool = True
    equality: bool = True
    attestation: bool = True
    statistics: bool = True
    effect: bool = True
    call_order: bool = True
    stream_join: bool = True
    agreement: bool = True
    balancedness: bool = True
    leaks: bool = True
    thresholds: dict[str, str] = {}

    def parsed_thresholds(self) -> tuple[Threshold, ...]:
        """The thresholds, parsed; they are known to parse since the scenario was loaded."""
        return parse_all(self.thresholds)


class Record(Section):
    """What the run folder keeps beside events and evidence: loads per layer and iteration, and every chosen id."""

    loads: bool = True
    topk_ids: bool = False
