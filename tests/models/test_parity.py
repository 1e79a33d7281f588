"""Our MoE blocks give what transformers' own give, while the balancer moves their experts and while it does not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core import architecture
from moe_eplb.core.events import NullSink
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import get_device
from moe_eplb.models import CheckpointWeights, MoeBlock, build_blocks
from tests.support.ranks import run_ranks

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
LAYERS, SLOTS, HIDDEN = 4, 12, 32
STEPS = {"static": 3, "dynamic": 15}
TOKENS = {1: [24], 2: [17, 7], 4: [11, 0, 9, 4]}
CHUNKS = 3
# Of all ranks together; allgather pads every rank to the fullest one.
LIMITS = {("alltoall", 1): 8, ("alltoall", 2): 9, ("alltoall", 4): 9}
LIMITS |= {("allgather", 1): 8, ("allgather", 2): 12, ("allgather", 4): 16}


class Case(NamedTuple):
    """One way to run a family's blocks."""

    family: str
    routing: str
    dispatch: str
    chunked: bool


CASES = [
    Case(*values) for values in itertools.product(FAMILIES, STEPS, ("alltoall", "allgather"), (False, True))
]  # fmt: skip


@dataclass
class Seen(NullProbe):
    """What a rank saw of a case: the largest error of a forward relative to its largest output, and counts."""

    error: float = 0.0
    forwards: int = 0
    chunks: int = 0
    commits: int = 0

    def routed(self, layer: int, expert_ids: Any, slot_ids: Any) -> None:
        self.chunks += 1

    def output(self, layer: int, x: Any, router_logits: Any, expert_ids: Any, scales: Any, y: Any) -> None:
        self.forwards += 1

    def committed(self, layer: int, taken: int, placement: Any, changed: np.ndarray, moved_bytes: int) -> None:
        self.commits += bool(len(changed))


def run_cases(rank: int, size: int, folder: Path) -> list[Seen]:
    groups = [dist.new_group(list(range(size))) if size > 1 else None for _ in range(3)]
    return [run_case(rank, size, folder / case.family, case, groups) for case in CASES]


def run_case(rank: int, size: int, folder: Path, case: Case, groups: list[Any]) -> Seen:
    device, seen = get_device("cpu", NullSink(), seed=11, rank=rank), Seen()
    found = architecture.read(folder)
    updates = LAYERS if case.routing == "dynamic" else 0
    options = BalancerOptions(decay=0.0, empty_group="never")
    balancer = MoeLoadBalancer(rank, size, updates, device=device, group=groups[0], options=options, probe=seen)
    with balancer:
        blocks = build_blocks(
            found, CheckpointWeights(folder, found), device, num_slots=SLOTS, ep_group=groups[1],
            statistics_group=groups[2], dispatch=case.dispatch,
            moe_max_num_tokens=LIMITS[case.dispatch, size] if case.chunked else None,
        )  # fmt: skip
    balancer.finalize_model()
    try:
        for block in blocks:
            block.moe.probe = seen
        run_steps(blocks, balancer, load_file(folder / "parity.safetensors"), STEPS[case.routing], seen, rank, size)
    finally:
        balancer.shutdown()
    return seen


def run_steps(
    blocks: list[MoeBlock],
    balancer: MoeLoadBalancer,
    data: dict[str, torch.Tensor],
    steps: int,
    seen: Seen,
    rank: int,
    size: int,
) -> None:
    tokens = TOKENS[size]
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    for step in range(steps):
        # In every second step the ranks tell each other how many tokens they have.
        known = tokens if step % 2 else None
        with MoeLoadBalancerIterContext(balancer, True, balancer.is_dynamic_routing()):
            for layer, block in enumerate(blocks):
                y = block(data["x"][layer, step, mine], known)
                wanted = data["y"][layer, step, mine]
                assert y.shape == wanted.shape
                if len(wanted):
                    seen.error = max(seen.error, float((y - wanted).abs().max() / wanted.abs().max()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of checkpoints, each with inputs and what transformers says to them, [L, steps, T of all ranks, D]."""
    from tests.support import tiny_models

    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        model = tiny_models.save(family, folder / family)
        layers = architecture.read(folder / family).moe_layers
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(LAYERS, STEPS["dynamic"], sum(TOKENS[1]), HIDDEN, generator=generator)
        # Every step and layer leans another way, so that other experts are hot.
        x += 2 * torch.randn(LAYERS, STEPS["dynamic"], 1, HIDDEN, generator=generator)
        y = tiny_models.moe_outputs(model, layers, x)
        save_file({"x": x, "y": y}, folder / family / "parity.safetensors")
    return folder


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda size: f"{size} ranks")
def results(request: pytest.FixtureRequest, models: Path) -> dict[Case, list[Seen]]:
    """For each case what every rank saw; all cases of one number of ranks share its processes."""
    by_rank = run_ranks(run_cases, request.param, models, timeout=110)
    return dict(zip(CASES, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize(
    "case", CASES, ids="-".join(("{0.family}", "{0.routing}", "{0.dispatch}", "{0.chunked}")).format
)
def test_output_is_that_of_transformers(results: dict[Case, list[Seen]], case: Case) -> None:
    for seen in results[case]:
        assert seen.error <= 1e-5
        assert seen.forwards == STEPS[case.routing] * LAYERS
        assert seen.chunks == seen.forwards * (CHUNKS if case.chunked else 1)
        assert seen.commits >= (50 if case.routing == "dynamic" else 0)
