"""Evidence that a run's results are right, gathered while it runs. Nothing here judges."""

from __future__ import annotations

from moe_eplb.checks.gather import EvidenceGatherer, WatchedLayer, watched_layer

__all__ = ["EvidenceGatherer", "WatchedLayer", "watched_layer"]
