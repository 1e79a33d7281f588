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
    """How the router chooses experts. `groups`, `top_groups`, `scale` and `normalize` belong to ``deepseek_v3``.

    ``llama4`` chooses one expert. `normalize`: whether a token's scales sum to `scale`.
    """

    method: Literal["default", "renormalize", "renormalize_naive", "deepseek_v3", "llama4"] = "renormalize"
    groups: Count = 1
    top_groups: Count = 1
    scale: float = Field(default=1.0, gt=0)
    normalize: bool = True


class Model(Section):
    """A stack of `layers` MoE layers: E `experts`, K `top_k`, D `hidden`, I `intermediate`.

    `shared_intermediate`: size of an expert that every token uses beside the routed ones, 0 for none.
    `repeated_layers`: layers that run more than once an iteration, as one shared by MTP steps does, and how often.
    `dtype`: of weights and hidden states; with ``float8_e4m3fn`` only the routed experts are fp8, with a scale for each
    row, and all else is bfloat16. `hf`: folder of a Hugging Face checkpoint, whose ``config.json`` gives all sizes;
    without weights in it they are drawn from the seed. `part`: the checkpoint's MoE ``blocks`` alone, or the ``whole``
    model generating text.
    """

    layers: int = Field(ge=1, le=4096)
    experts: int = Field(ge=1, le=1024)
    top_k: int = Field(ge=1, le=64)
    hidden: int = Field(default=64, ge=1, le=1 << 16)
    intermediate: int = Field(default=32, ge=1, le=1 << 16)
    shared_intermediate: int = Field(default=0, ge=0, le=1 << 16)
    repeated_layers: dict[int, Annotated[int, Field(ge=2, le=16)]] = {}
    dtype: Literal["float32", "bfloat16", "float8_e4m3fn"] = "float32"
    backend: Literal["wide_ep", "grouped", "fused"] = "wide_ep"
    routing: Routing = Routing()
    hf: str | None = None
    part: Literal["whole", "blocks"] | None = None

    def repeats(self, layer: int) -> int:
        """How often a layer runs in one iteration."""
        return self.repeated_layers.get(layer, 1)


class Workload(Section):
    """Which experts the tokens ask for, and how many tokens there are.

    ``balanced``: every expert equally often, to one. ``uniform``: drawn, all alike. ``zipf``: the n-th hottest expert
    has weight n**-skew. ``hot``: `hot_experts` of them share `hot_share` of the probability. ``hot_rank``: the experts
    that rank `hot_rank` holds at the start share it. ``spread_hot``: `hot_experts` of them share it, equally many, to
    one, of each rank that holds their first slots at the start. ``idle``: nobody asks for what rank `idle_rank` alone
    holds at the start, nor for `idle_experts` others. ``rotating``: as hot, but the next `hot_experts` in turn become
    the hot ones. ``burst``: drawn alike, but the last of every `burst_every` iterations has `burst_factor` times the
    tokens and they ask as in hot. ``model``: the router's own choice. ``recorded``: from the file at `path`.
    `drift_every`: iterations after which zipf and hot draw other experts as the hot ones, 0 for never, and after which
    rotating moves on, 0 for 1. `order`: the tokens of a recorded file as they stand, or by position so that its
    sequences decode side by side.

    `tokens_per_rank`: sequences of each rank. `steps`: in a ``decode`` step every sequence has one token, in a
    ``prefill`` step `prompt_tokens`; in ``mixed`` steps all decode and each rank in turn takes in one prompt more;
    ``generate`` is one prefill step and then decode steps. `ragged`: by up to this share, drawn for each iteration and
    rank, there are fewer or more tokens; with 1 some ranks have none at times, but never all.
    """

    kind: Literal[
        "balanced", "uniform", "zipf", "hot", "hot_rank", "spread_hot", "idle", "rotating", "burst", "model", "recorded"
    ] = "uniform"
    tokens_per_rank: TokensPerRank = 64
    steps: Literal["decode", "prefill", "mixed", "generate"] = "decode"
    prompt_tokens: Count = 1
    ragged: float = Field(default=0.0, ge=0, le=1)
    skew: float = Field(default=1.0, ge=0, le=16)
    hot_experts: Count = 1
    hot_share: float = Field(default=0.5, gt=0, le=1)
    hot_rank: int = Field(default=0, ge=0, lt=64)
    idle_experts: int = Field(default=0, ge=0, le=1024)
    idle_rank: int | None = Field(default=None, ge=0, lt=64)
    burst_every: int = Field(default=8, ge=2, le=1 << 20)
    burst_factor: int = Field(default=4, ge=1, le=64)
    drift_every: int = Field(default=0, ge=0, le=1 << 20)
    path: str | None = None
    order: Literal["file", "position"] = "file"


class Balancer(Section):
    """The online balancer. Slots are given as `num_slots` (P) or `slots_per_rank` (P / R), or come from `config`.

    `layer_updates_per_iter` 0 is static routing. `empty_group`: whether the update cycle ends with an iteration that
    updates nothing where the published rule has one. `commit_delay`: iterations from an update's start to its commit.
    `window` and `decay`: how statistics add up. `warm_up`: first iterations that move nothing. `update_timeout_s`:
    seconds that a commit is waited for. `config`: path of a TensorRT-LLM balancer file to take the placement from.
    `spare_slots`: how many slots of a rank a plan changes at most; by default all. `state`: whether loads, tables and
    votes live on the ``host``, or on the ``device``, which then counts, votes and commits without a look by the host,
    and where each spare slot takes the memory of one. `run_ahead`: how many iterations the host may then be ahead;
    `awake_updater`: whether its updater may use a core while it waits for the device, to hear it sooner.
    `weights_from`: whether an expert that moves is copied from the ``host``, which has a copy of each, or from a slot
    of this rank or a ``peer`` that holds it. `reduction`: whether each ``layer`` sums its counts and votes over the
    ranks, or all layers together once an ``iteration``, with the state on the device and statistics of local ids.
    `policy`: how a layer is planned, by the ``reference``'s rules from scratch, ``incremental`` with as few moves as a
    plan so balanced takes, or ``robust`` for what the layer's last loads let expect; `moves_per_update`: how many slots
    of a layer these two change at most, over all ranks. `min_gain`: share by which a plan has to make the balancedness
    grow, such as 0.02; otherwise nothing moves. `alone`: also with one rank, where balance cannot get better,
    to see what balancing costs.
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
    state: Literal["host", "device"] = "host"
    spare_slots: Annotated[int, Field(ge=1, le=1024)] | None = None
    run_ahead: int = Field(default=4, ge=1, le=1024)
    awake_updater: bool = False
    weights_from: Literal["host", "peer"] = "host"
    reduction: Literal["layer", "iteration"] = "layer"
    alone: bool = False
    policy: Literal["reference", "incremental", "robust"] = "reference"
    moves_per_update: Count | None = None
    min_gain: float = Field(default=0.0, ge=0, le=1000)


class Checks(Section):
    """What is proved on the run. `thresholds` maps a metric to ``[agg] op number``.

    `generation` belongs to whole models: they say what transformers says without us.
    """

    exactly_once: bool = True
    equality: bool = True
    attestation: bool = True
    statistics: bool = True
    effect: bool = True
    call_order: bool = True
    stream_join: bool = True
    agreement: bool = True
    balancedness: bool = True
    generation: bool = True
    leaks: bool = True
    thresholds: dict[str, str] = {}

    def parsed_thresholds(self) -> tuple[Threshold, ...]:
        """The thresholds, parsed; they are known to parse since the scenario was loaded."""
        return parse_all(self.thresholds)


class Record(Section):
    """What the run folder keeps beside events and evidence.

    `loads`: tokens per layer, iteration and expert. `topk_ids`: every chosen id. `metrics`: Prometheus text.
    `recorder`: what records beside our own event log, which is always written. ``torch``: the torch profiler, around
    the last `profile_iterations`, to one Chrome JSON a rank. ``nsys``: Nsight Systems around the whole run, to SQLite;
    `keep_report` keeps its raw report too, which holds the environment of the process and must not be published.
    """

    recorder: Literal["builtin", "torch", "nsys"] = "builtin"
    profile_iterations: int = Field(default=3, ge=1, le=1024)
    keep_report: bool = False
    loads: bool = True
    topk_ids: bool = False
    metrics: bool = False
