"""MoE blocks of the models that this project knows, and where their weights come from."""

from __future__ import annotations

from moe_eplb.models.block import MoeBlock
from moe_eplb.models.build import build_block, build_blocks, make_aux_streams, weight_dtype
from moe_eplb.models.checkpoint import CheckpointWeights, open_weights
from moe_eplb.models.families import FAMILIES
from moe_eplb.models.family import Family, FeedForwardNames, TensorNames
from moe_eplb.models.shared_expert import SharedExpert, SharedStream
from moe_eplb.models.weights import SeededWeights, Weights

__all__ = [
    "FAMILIES",
    "CheckpointWeights",
    "Family",
    "FeedForwardNames",
    "MoeBlock",
    "SeededWeights",
    "SharedExpert",
    "SharedStream",
    "TensorNames",
    "Weights",
    "build_block",
    "build_blocks",
    "make_aux_streams",
    "open_weights",
    "weight_dtype",
]
