"""The arithmetic of memory is what runs measure, and that of moves what a link and the balancer would do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest

from moe_eplb.balancer.host_memory import SHM_DIR, create_segment, new_instance, remove_segment
from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.core import scenario as scenarios
from moe_eplb.core.events import NullSink
from moe_eplb.core.evidence import Row, read_evidence
from moe_eplb.core.memory import Memory, memory_of, move_time
from moe_eplb.core.scenario import Scenario
from moe_eplb.core.schedule import update_groups
from moe_eplb.device import get_device
from moe_eplb.moe import DeepSeekV3MoeRoutingMethod
from moe_eplb.session import RankPool
from moe_eplb.session.folder import evidence_path
from moe_eplb.session.groups import Groups
from moe_eplb.session.model import make_model
from tests.support.balanced import Rig

SHIPPED = Path(__file__).parents[2] / "scenarios"

# Sizes that 256 bytes do not divide, experts that ranks do not, and slots that are more than the fewest.
TEXT = """\
name: memory
ranks: 2
iterations: 3
model: {layers: 3, experts: 7, top_k: 2, hidden: 20, intermediate: 12}
workload: {tokens_per_rank: 4}
balancer: {slots_per_rank: 5, layer_updates_per_iter: 2, empty_group: never}
"""
BFLOAT16 = ("model.dtype=bfloat16", "model.hidden=24", "model.intermediate=8")
FP8 = ("model.dtype=float8_e4m3fn", "model.hidden=48", "model.intermediate=16")
R1 = """\
ranks: 32
iterations: 10
model: {layers: 58, experts: 256, top_k: 8, hidden: 7168, intermediate: 2048, shared_intermediate: 2048,
  dtype: bfloat16}
balancer: {slots_per_rank: 9, layer_updates_per_iter: 2, commit_delay: 1}
"""
MOVES = (
    "staging_bytes",
    "host_bytes",
    "host_share_bytes",
    "shm_bytes",
    "update_bytes",
    "largest_group",
    "commit_delay",
)


def scenario(*overrides: str, text: str = TEXT) -> Scenario:
    return scenarios.loads(text, "memory.yaml", overrides)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        yield ranks


@pytest.mark.parametrize(
    "overrides",
    [(), (*BFLOAT16, "model.shared_intermediate=16"), (*FP8, "model.shared_intermediate=16"),
     ("balancer.state=device", "balancer.weights_from=peer"), ("balancer.layer_updates_per_iter=0",),
     ("balancer=null",), ("balancer=null", "model.backend=grouped")],
    ids=str,
)  # fmt: skip
def test_a_run_measures_the_same(overrides: tuple[str, ...], pool: RankPool, tmp_path: Path) -> None:
    _same_as_measured(scenario(*overrides), pool, tmp_path)


@pytest.mark.parametrize("overrides", [[], ["model.dtype=float8_e4m3fn"]], ids=str)
def test_a_run_of_a_checkpoints_blocks_measures_the_same(overrides: list[str], pool: RankPool, tmp_path: Path) -> None:
    _same_as_measured(scenarios.load(SHIPPED / "models" / "qwen2_moe_blocks.yaml", overrides), pool, tmp_path)


def _same_as_measured(one: Scenario, pool: RankPool, folder: Path) -> None:
    assert pool.run(one, folder / "run").verdict.failure == ""
    memory = memory_of(one)
    for rank in range(one.ranks):
        (row,) = (row for row in read_evidence(evidence_path(folder / "run", rank)) if row["row"] == Row.MEMORY)
        assert (row["slots_bytes"], row["host_bytes"]) == (memory.slots_bytes, memory.host_bytes)
    from_host = one.balancer is None or one.balancer.weights_from == "host"
    assert (memory.host_bytes > 0) is (one.balancer_off_reason() is None and from_host)


def test_experts_in_fp8_are_bytes_and_a_scale_for_each_row() -> None:
    memory = memory_of(scenario(*FP8))
    expert = 3 * 48 * 16 + 4 * (2 * 16 + 48)
    assert (memory.slots_bytes, memory.update_bytes) == (3 * 5 * expert, 5 * expert)
    # The host copy's tensors begin at multiples of 256 bytes, scales too.
    assert memory.host_bytes == 3 * 7 * (2 * 16 * 48 + 48 * 16 + 256 + 256)


def test_routers_and_shared_experts_are_those_of_the_blocks() -> None:
    family = "{name: one, ranks: 1, iterations: 1, model: {hf: %s, part: blocks}, workload: {kind: model}}"
    ones = [scenarios.loads(family % folder, "one.yaml") for folder in sorted((SHIPPED / "data").glob("tiny_*"))]
    assert {one.model.shared_intermediate > 0 for one in ones} == {True, False}
    deepseek = "model.routing={method: deepseek_v3}"
    ones += [scenario(deepseek, "workload.kind=model", "ranks=1", "balancer=null")]
    ones += [
        scenario(*more, "model.shared_intermediate=16", "ranks=1", "balancer=null") for more in ((), BFLOAT16, FP8)
    ]
    for one in ones:
        model = make_model(one, 0, get_device("cpu", NullSink()), Groups(None, None, None, None))
        routers = [block.router for block in model.blocks]
        biases = [
            block.moe.routing_method.e_score_correction_bias
            for block in model.blocks
            if isinstance(block.moe.routing_method, DeepSeekV3MoeRoutingMethod)
        ]
        shared = [weight for block in model.blocks if block.shared is not None for weight in block.shared.parameters()]
        memory = memory_of(one)
        assert memory.router_bytes == sum(tensor.nbytes for tensor in routers + biases), one.model.hf
        assert memory.shared_bytes == sum(tensor.nbytes for tensor in shared), one.model.hf
        assert memory.slots_bytes == sum(
            weight.nbytes for block in model.blocks for slot in block.moe.experts.by_slot() for weight in slot.values()
        )


@pytest.mark.parametrize(("experts", "ranks"), [(7, 2), (8, 2), (10, 4), (5, 5)])
def test_shares_of_the_host_copies_are_the_sharers_and_take_whole_pages(experts: int, ranks: int) -> None:
    one = scenario(
        f"model.experts={experts}", f"ranks={ranks}", "model.layers=2", "model.hidden=24", "model.intermediate=8"
    )  # fmt: skip
    memory = memory_of(one)
    expert = (2 * 8 * 24 * 4) + 768  # w3_w1 has 1536 bytes, w2 768: both are multiples of 256
    sharers = [HostMoeTensorSharer(0, experts, rank=r, ranks=ranks, instance="x", group=None) for r in range(ranks)]
    shares = [len(sharer.experts_of(rank)) * expert for rank, sharer in enumerate(sharers)]
    assert memory.host_share_bytes == 2 * max(shares)
    assert memory.host_bytes == 2 * sum(shares) == 2 * experts * expert
    taken = 0
    for rank, share in enumerate(shares):
        name, _ = create_segment(new_instance(), f"l0r{rank}", share)
        taken += (SHM_DIR / name).stat().st_blocks * 512
        remove_segment(name)
    assert memory.shm_bytes == 2 * taken


def test_host_copies_are_aligned() -> None:
    odd = memory_of(scenario("model.hidden=20", "model.intermediate=4"))  # 640 and 320 bytes become 768 and 512
    assert odd.host_bytes == 3 * 7 * (768 + 512)
    assert odd.update_bytes == 5 * (640 + 320)


@pytest.mark.parametrize(
    ("layers", "updates", "empty", "delay"),
    [*product((4, 5), (1, 2, 3, 9), ("reference", "never"), (1, 2, 3)), (1, 1, "never", 2), (7, 3, "never", 4)],
)
def test_staging_is_what_the_balancer_has_pending_at_most_and_one_more(
    layers: int, updates: int, empty: str, delay: int
) -> None:
    one = scenario(
        f"model.layers={layers}", f"balancer.layer_updates_per_iter={updates}", f"balancer.empty_group={empty}",
        f"balancer.commit_delay={delay}", "iterations=40",
    )  # fmt: skip
    rig = Rig(layers, updates=updates, empty_group=empty, commit_delay=delay)
    most = 0
    for _ in range(2 * layers + 2 * delay + 2):
        rig.balancer.start_iter()
        for layer in range(layers):
            rig.run_layer(layer)
            most = max(most, sum(one.updates.pending is not None for one in rig.layers))
        rig.balancer.end_iter()
    rig.balancer.shutdown()
    assert rig.journal.drops == []
    memory = memory_of(one)
    assert memory.staging_bytes == (most + 1) * memory.update_bytes


@pytest.mark.parametrize("layers", [1, 4, 6, 7])
def test_the_shortest_step_is_the_shortest(layers: int) -> None:
    """On a link that copies one update after the other, none is late with it, and some is with one 3 % shorter."""
    for updates, empty, delay in product(range(1, layers + 2), ("reference", "never"), range(1, 2 * layers + 4)):
        if layers == 1 and delay == 1:
            continue
        one = scenario(
            f"model.layers={layers}", f"balancer.layer_updates_per_iter={updates}", "iterations=40",
            f"balancer.empty_group={empty}", f"balancer.commit_delay={delay}",
        )  # fmt: skip
        move = move_time(memory_of(one), bandwidth_gb_s=1)
        assert move is not None
        shortest = Fraction(move.shortest_step_ms / move.move_ms).limit_denominator(1000)
        assert not _late(one, shortest), (updates, empty, delay)
        assert _late(one, shortest * Fraction(97, 100)), (updates, empty, delay)


def _late(one: Scenario, step: Fraction) -> bool:
    """Whether any update is copied after it is due; all of an iteration's come at once, each takes a time of 1."""
    assert one.balancer is not None
    groups = update_groups(one.model.layers, one.balancer.layer_updates_per_iter, empty_group=one.balancer.empty_group)
    due: dict[int, int] = {}
    idle = Fraction(0)
    for iteration in range(250):
        for layer in groups[iteration % len(groups)]:
            if due.get(layer, 0) <= iteration:
                due[layer] = iteration + one.balancer.commit_delay
                idle = max(idle, iteration * step) + 1
                if idle > due[layer] * step:
                    return True
    return False


def test_figures_of_a_large_model() -> None:
    memory = memory_of(scenario(text=R1))
    expert = 3 * 7168 * 2048 * 2  # 88 MB
    assert memory.slots_bytes == 58 * 9 * expert
    assert memory.router_bytes == 58 * 256 * 7168 * 4
    assert memory.shared_bytes == 58 * expert
    assert memory.host_bytes == 58 * 256 * expert == 32 * memory.host_share_bytes == memory.shm_bytes
    assert memory.update_bytes == 9 * expert
    # Two layers a group, 29 groups and an empty one; while one pair is handed over the one before is committed.
    assert (memory.largest_group, memory.staging_bytes) == (2, 3 * 9 * expert)
    parts = memory.slots_bytes + memory.router_bytes + memory.shared_bytes + memory.staging_bytes
    assert memory.rank_bytes == parts


def test_a_move_against_its_window() -> None:
    memory = dataclasses.replace(memory_of(scenario(text=R1)), update_bytes=55_000_000)
    alone = move_time(memory, bandwidth_gb_s=55)
    assert alone is not None
    assert alone.move_ms == pytest.approx(1)
    assert alone.shortest_step_ms == pytest.approx(2)
    assert (alone.window_ms, alone.fits) == (None, None)
    for step_ms, fits in ((1.9, False), (2.1, True)):
        move = move_time(memory, bandwidth_gb_s=55, step_ms=step_ms)
        assert move is not None
        assert move.window_ms == step_ms
        assert move.fits is fits
    slow = move_time(memory, bandwidth_gb_s=5.5, step_ms=2.1)
    assert slow is not None
    assert slow.move_ms == pytest.approx(10)
    assert slow.fits is False


@pytest.mark.parametrize("off", ["balancer=null", "balancer.layer_updates_per_iter=0", "ranks=1"])
def test_where_nothing_moves_nothing_pretends_to(off: str) -> None:
    memory = memory_of(scenario(off) if off != "ranks=1" else scenario(off, "balancer.slots_per_rank=7"))
    assert {getattr(memory, name) for name in MOVES} == {0}
    assert memory.slots_bytes > 0
    assert move_time(memory, bandwidth_gb_s=55, step_ms=1) is None


def test_scripted_calls_have_no_model() -> None:
    static = memory_of(scenarios.load(SHIPPED / "calls" / "legal_static_routing.yaml"))
    assert static == Memory(0, 0, 0)
    dynamic = memory_of(scenarios.load(SHIPPED / "calls" / "legal_path_b.yaml"))
    assert (dynamic.router_bytes, dynamic.shared_bytes) == (0, 0)
    assert dynamic.slots_bytes > 0
    assert dynamic.host_bytes > 0
