"""From a scenario to a judged run folder: ranks are started, driven and watched. Importable without torch."""

from __future__ import annotations

from moe_eplb.session.messages import Timing
from moe_eplb.session.pool import RankPool, run_scenario
from moe_eplb.session.result import Progress, RunResult
from moe_eplb.session.torchrun import joined, run_joined

__all__ = ["Progress", "RankPool", "RunResult", "Timing", "joined", "run_joined", "run_scenario"]
