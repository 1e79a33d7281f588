"""What a Hugging Face ``config.json`` says about a model's MoE layers, for the families that this project knows."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.input_file import read_input

__all__ = ["FAMILIES", "Architecture", "parse", "read"]

_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a model's MoE layers, which are all alike.

    `family` is the configuration's ``model_type``, `name` its first architecture, `moe_layers` the numbers of the MoE
    layers among all `hidden_layers`. `routing` has the keys of a scenario's routing section. `dtype` is that of the
    checkpoint, as torch calls it.
    """

    family: str
    name: str
    hidden_layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared_intermediate: int
    dtype: str
    routing: Mapping[str, Any] = field(default_factory=dict)


def read(folder: Path) -> Architecture:
    """The architecture that ``folder/config.json`` describes.

    Raises:
        ScenarioError: E043 when it cannot be read, E044 for a model that is not supported, E045 for values that are
            missing or wrong.
    """
    path = folder / "config.json"
    return parse(_config(path), str(path))


def parse(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a configuration describes; `where` is named in errors, see `read`."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ScenarioError(
            "E044", f"model_type {family!r} is not supported", hint=f"supported are {', '.join(FAMILIES)}", where=where
        )
    _refuse_unsupported(config, where)
    try:
        return FAMILIES[family].model_validate(config).architecture()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        why = "it is missing" if first["type"] == "missing" else f"{first['msg']}, not {first['input']!r}"
        raise ScenarioError("E045", f"{key!r} of a {family} model is wrong", why=why, where=where) from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_input(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        hint = "model.hf is a folder that save_pretrained wrote, with config.json in it"
        raise ScenarioError("E043", "the model's configuration cannot be read", why=why, hint=hint, where=str(path)) \
            from error  # fmt: skip
    if not isinstance(config, dict):
        raise ScenarioError("E043", "the model's configuration is no mapping", where=str(path))
    return config


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    for key, legal in (("hidden_act", (None, "silu")), ("quantization_config", (None,)), ("moe_layer_freq", (None, 1))):
        if config.get(key) not in legal:
            raise ScenarioError(
                "E044", f"{key!r} of the model is not supported", why=f"it is {str(config[key])[:60]!r}",
                hint=f"supported: {', '.join(map(str, legal))}", where=where,
            )  # fmt: skip


class _Config(BaseModel):
    """Keys that all families share; whatever else a configuration holds does not concern the MoE layers."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str
    architectures: list[str] | None = None
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=4096)
    num_experts_per_tok: int = Field(ge=1)
    # Families and versions of transformers name it differently.
    num_experts: int = Field(
        ge=1, validation_alias=AliasChoices("num_experts", "num_local_experts", "n_routed_experts")
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @abc.abstractmethod
    def architecture(self) -> Architecture:
        """What the MoE layers of a model of this family are."""

    def _made(self, *, layers: list[int], intermediate: int, shared: int, routing: dict[str, Any]) -> (
        Architecture
    ):  # fmt: skip
        name = (self.architectures or [_NAMES[self.model_type]])[0]
        dtype = self.dtype or self.torch_dtype or "float32"
        return Architecture(
            self.model_type, name, self.num_hidden_layers, tuple(layers), self.num_experts, self.num_experts_per_tok,
            self.hidden_size, intermediate, shared, dtype, routing,
        )  # fmt: skip


class _Mixtral(_Config):
    intermediate_size: int = Field(ge=1)

    def architecture(self) -> Architecture:
        return self._made(
            layers=list(range(self.num_hidden_layers)),
            intermediate=self.intermediate_size, shared=0, routing={"method": "renormalize"},
        )  # fmt: skip


class _Qwen3(_Config):
    moe_intermediate_size: int = Field(ge=1)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, ge=1)
    mlp_only_layers: list[int] = []

    @property
    def shared(self) -> int:
        """Intermediate size of the shared expert."""
        return 0

    def architecture(self) -> Architecture:
        sparse = range(self.decoder_sparse_step - 1, self.num_hidden_layers, self.decoder_sparse_step)
        return self._made(
            layers=[layer for layer in sparse if layer not in self.mlp_only_layers],
            intermediate=self.moe_intermediate_size, shared=self.shared,
            routing={"method": "renormalize_naive" if self.norm_topk_prob else "default"},
        )  # fmt: skip


class _Qwen2(_Qwen3):
    shared_expert_intermediate_size: int = Field(ge=1)

    @property
    def shared(self) -> int:
        return self.shared_expert_intermediate_size


class _DeepSeekV3(_Config):
    n_shared_experts: int = Field(default=1, ge=0)
    moe_intermediate_size: int = Field(ge=1)
    first_k_dense_replace: int = Field(default=0, ge=0)
    n_group: int | None = Field(default=1, ge=1)
    topk_group: int | None = Field(default=1, ge=1)
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    norm_topk_prob: bool = True

    def architecture(self) -> Architecture:
        routing = {
            "method": "deepseek_v3", "groups": self.n_group or 1, "top_groups": self.topk_group or 1,
            "scale": self.routed_scaling_factor, "normalize": self.norm_topk_prob,
        }  # fmt: skip
        return self._made(
            layers=list(range(self.first_k_dense_replace, self.num_hidden_layers)),
            intermediate=self.moe_intermediate_size, shared=self.moe_intermediate_size * self.n_shared_experts,
            routing=routing,
        )  # fmt: skip


FAMILIES: dict[str, type[_Config]] = {
    "deepseek_v3": _DeepSeekV3,
    "mixtral": _Mixtral,
    "qwen2_moe": _Qwen2,
    "qwen3_moe": _Qwen3,
}
"""Supported families by ``model_type``."""

_NAMES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
