"""The families that this project knows, by ``model_type``."""

from __future__ import annotations

from moe_eplb.models.deepseek_v3 import DeepSeekV3
from moe_eplb.models.family import Family
from moe_eplb.models.mixtral import Mixtral
from moe_eplb.models.qwen3_moe import Qwen3Moe
from moe_eplb.models.qwen_moe import Qwen2Moe

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DeepSeekV3(),
    "mixtral": Mixtral(),
    "qwen2_moe": Qwen2Moe(),
    "qwen3_moe": Qwen3Moe(),
}
"""The same as `moe_eplb.core.architecture.FAMILIES` reads configurations of."""
