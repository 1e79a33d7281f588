"""The gatherer writes down how long the model waited for a plan, once, with what came of the waiting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_eplb.checks import EvidenceGatherer
from moe_eplb.core.evidence import EvidenceWriter, Row, read_evidence
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan

PLACEMENT = Placement(1, 2, np.array([0, 1], dtype=np.int32))


@pytest.mark.parametrize("end", ["planned", "dropped"])
def test_a_stall_belongs_to_the_plan_that_was_waited_for(end: str, tmp_path: Path) -> None:
    writer = EvidenceWriter(tmp_path / "evidence", 0)
    gatherer = EvidenceGatherer(writer, rank=0, ranks=1, group=None, local_first=False, checks=frozenset())

    def finish(layer: int) -> None:
        if end == "planned":
            gatherer.planned(layer, 0, 1, Plan(PLACEMENT, np.array([1]), np.ones(1)), 8)
        else:
            gatherer.dropped(layer, 1, 0, False, "late")

    gatherer.stalled(1, 0.25)
    gatherer.awaited(1, 0.5)
    for layer in (0, 1, 1):
        finish(layer)
    writer.close()
    rows = list(read_evidence(tmp_path / "evidence"))
    assert {row["row"] for row in rows} == {Row.PLAN if end == "planned" else Row.DROPPED}
    waits = [(row["layer"], row["stall_us"], row["awaited_us"]) for row in rows]
    assert waits == [(0, 0, 0), (1, 250_000, 500_000), (1, 0, 0)]
