"""Planning kernels, compiled; each is plain Python too (``kernel.py_func``)."""

from __future__ import annotations

from moe_eplb.planning.kernels.greedy import floor_of, greedy_layer, greedy_layers, replicate
from moe_eplb.planning.kernels.labels import relabel, relabel_layers
from moe_eplb.planning.kernels.restarts import kick, refine_layers
from moe_eplb.planning.kernels.search import improve, measure, replay_steps, step_layers

__all__ = [
    "floor_of", "greedy_layer", "greedy_layers", "improve", "kick", "measure", "refine_layers", "relabel",
    "relabel_layers", "replay_steps", "replicate", "step_layers",
]  # fmt: skip
