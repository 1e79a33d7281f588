"""TensorRT-LLM's load balancer file, read as it is."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_eplb.core import yaml_source
from moe_eplb.core.errors import ScenarioError

__all__ = ["LoadBalancerConfig", "load", "loads"]


class LoadBalancerConfig(BaseModel):
    """``num_slots`` (P), ``layer_updates_per_iter`` (0: static routing) and, by the model's layer number, the expert of
    each slot in ``initial_global_assignments``. Some tools also write ``ep_size`` (R)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    num_slots: int = Field(ge=1)
    layer_updates_per_iter: int = Field(0, ge=0)
    initial_global_assignments: dict[int, list[int]] | None = None
    ep_size: int | None = Field(None, ge=1)


def load(path: Path) -> LoadBalancerConfig:
    """Read a file. Unknown keys are refused: a misspelt key must not be ignored in silence."""
    return loads(yaml_source.read_text(path), str(path))


def loads(text: str, name: str) -> LoadBalancerConfig:
    """Read the text of a file called `name`."""
    document = yaml_source.load(text, name)
    if not isinstance(document.data, dict):
        raise ScenarioError("E031", "the balancer file holds no mapping", hint="it begins with num_slots:", where=name)
    try:
        config = LoadBalancerConfig.model_validate(document.data)
    except ValidationError as error:
        raise _unreadable(error, document) from error
    _check_assignments(config, document)
    return config


def _check_assignments(config: LoadBalancerConfig, document: yaml_source.Document) -> None:
    for layer, experts in (config.initial_global_assignments or {}).items():
        where = document.where(("initial_global_assignments", layer))
        if layer < 0:
            raise ScenarioError("E032", f"layer {layer} is negative", hint="layers are counted from 0", where=where)
        if len(experts) != config.num_slots:
            raise ScenarioError(
                "E032", f"layer {layer} assigns {len(experts)} slots, not {config.num_slots}",
                hint="give one expert for each of num_slots slots", where=where,
            )  # fmt: skip
        if len(set(experts)) != max(experts) + 1 or min(experts) < 0:
            raise ScenarioError(
                "E032", f"layer {layer} leaves experts out",
                why=f"ids {min(experts)} to {max(experts)}, of which {len(set(experts))} have a slot",
                hint="every expert from 0 on needs at least one slot", where=where,
            )  # fmt: skip


def _unreadable(error: ValidationError, document: yaml_source.Document) -> ScenarioError:
    """The first problem of a file as one error with its place."""
    first: Any = error.errors()[0]
    loc = tuple(part for part in first["loc"] if isinstance(part, str | int))
    unknown = first["type"] == "extra_forbidden"
    known = list(LoadBalancerConfig.model_fields)
    hint = f"the keys are {', '.join(known)}"
    if unknown and (near := difflib.get_close_matches(str(loc[-1]), known, 1)):
        hint = f"did you mean {near[0]!r}?"
    what = f"unknown key {loc[-1]!r}" if unknown else f"{'.'.join(map(str, loc)) or 'the file'}: {first['msg']}"
    return ScenarioError("E031", what, hint=hint, where=document.where(loc, key=unknown))
