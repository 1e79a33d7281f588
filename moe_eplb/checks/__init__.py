"""Evidence that a run's results are right, gathered while it runs. Nothing here judges."""

from __future__ import annotations

from moe_eplb.checks.gather import EvidenceGatherer, WatchedLayer, watched_layer
from moe_eplb.checks.topk_ids import TopkIds

__all__ = ["EvidenceGatherer", "TopkIds", "WatchedLayer", "watched_layer"]
