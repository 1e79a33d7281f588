"""Inputs that are drawn ahead, for steps whose time is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.session.groups import Groups
from moe_eplb.session.stack import MoeStack

_TEXT = """
name: ahead
ranks: 1
iterations: 4
model: {{layers: 2, experts: 6, top_k: 2, hidden: 16, intermediate: 8}}
workload: {{kind: {kind}, tokens_per_rank: 5}}
"""


@pytest.mark.parametrize(("kind", "shares"), [("zipf", True), ("model", False)])
def test_hidden_states_are_shared_where_no_router_reads_them(kind: str, shares: bool, tmp_path: Path) -> None:
    scenario = scenarios.loads(_TEXT.format(kind=kind), str(tmp_path / "ahead.yaml"))
    stack = MoeStack(scenario, 0, get_device("cpu", NullSink()), Groups(None, None, None, None))
    wanted = [stack.inputs(iteration) for iteration in range(3)]
    stack.prefetch(range(3))
    found = [stack.inputs(iteration) for iteration in range(3)]
    assert torch.equal(found[0].x, wanted[0].x)
    for iteration in range(3):
        assert torch.equal(found[iteration].x, wanted[iteration].x) == (iteration == 0 or not shares)
        assert found[iteration].ids.keys() == wanted[iteration].ids.keys()
        assert all(torch.equal(ids, wanted[iteration].ids[at]) for at, ids in found[iteration].ids.items())
    assert (found[1].x is found[0].x) == shares
