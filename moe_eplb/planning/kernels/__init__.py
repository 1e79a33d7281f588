"""Planning kernels, compiled; each is plain Python too (``kernel.py_func``)."""

from __future__ import annotations

from moe_eplb.planning.kernels.free import free_split_layers
from moe_eplb.planning.kernels.greedy import floor_of, greedy_layer, greedy_layers, replicate
from moe_eplb.planning.kernels.labels import relabel, relabel_layers
from moe_eplb.planning.kernels.restarts import kick, refine_layers
from moe_eplb.planning.kernels.rounds import LONGEST
from moe_eplb.planning.kernels.search import improve, replay_steps, step_layers
from moe_eplb.planning.kernels.state import new_state, set_layer

__all__ = [
    "LONGEST", "floor_of", "free_split_layers", "greedy_layer", "greedy_layers", "improve", "kick", "new_state",
    "refine_layers", "relabel", "relabel_layers", "replay_steps", "replicate", "set_layer", "step_layers",
]  # fmt: skip
