"""The balancer's steps on the device: kernels against their plain twins, on states that a run goes through."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch

from moe_eplb.device.control import LANES, LayerState, ModelState, Outcome, Report, Stage, plain

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
triton_control = pytest.importorskip("moe_eplb.device.control.triton_control")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMEOUT_NS = 20_000_000


def visible(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=DEVICE.type == "cuda")


@dataclasses.dataclass
class World:
    """A model of L layers."""

    model: ModelState
    layers: list[LayerState]

    @staticmethod
    def make(layers: int, experts: int, slots: int, per_rank: int, window: int = 1) -> World:
        made = [
            LayerState.make(
                layer, experts, torch.arange(2 * experts + slots, dtype=torch.int32, device=DEVICE),
                torch.arange(per_rank, dtype=torch.int32, device=DEVICE), window, visible,
            )
            for layer in range(layers)
        ]  # fmt: skip
        return World(ModelState.make(layers, DEVICE, visible), made)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"model.{f.name}": getattr(self.model, f.name) for f in dataclasses.fields(self.model)}
        for state in self.layers:
            fields = [f.name for f in dataclasses.fields(state) if f.name != "layer"]
            found |= {f"{state.layer}.{name}": getattr(state, name) for name in fields}
        return found


def assert_equal(fast: World, slow: World) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for (name, a), b in zip(fast.tensors().items(), slow.tensors().values(), strict=True):
        a, b = a.cpu().clone(), b.cpu().clone()
        if name == "model.reports":  # how long a wait took differs
            a[..., Report.WAITED_NS] = b[..., Report.WAITED_NS] = 0
        assert torch.equal(a, b), name


def twins(seed: int, layers: int = 3, experts: int = 37, slots: int = 44, window: int = 2) -> tuple[World, World]:
    """Two equal worlds in which pending plans, votes and loads are drawn."""
    draw = torch.Generator().manual_seed(seed)
    world = World.make(layers, experts, slots, slots // 2, window)
    model = world.model
    model.turn.copy_(torch.tensor([5, seed % 3 > 0, *torch.randint(0, 2, (layers,), generator=draw).tolist()]))
    model.due.copy_(torch.randint(-1, 8, (layers,), generator=draw))
    model.due[seed % layers] = 5 + (seed % layers == 0)  # so that each call meets what is due
    model.decision.copy_(torch.randint(-1, 2, (layers,), generator=draw))
    model.ready.copy_(torch.randint(-1, 8, (layers,), generator=draw))
    for state in world.layers:
        state.pending.copy_(torch.randint(0, 99, state.pending.shape, generator=draw))
        state.lanes.copy_(torch.randint(1, 9, state.lanes.shape, generator=draw))
        state.counts.copy_(torch.randint(0, 50, state.counts.shape, generator=draw))
        state.recent.copy_(torch.randint(0, 50, state.recent.shape, generator=draw))
        state.load.copy_(torch.rand(state.load.shape, generator=draw) * 100)
        state.folded.fill_(seed % 4)
    return world, copy.deepcopy(world)


def no_wait(layer: int, due: int, timeout_ns: int) -> int:
    return 0


WAIT = None if DEVICE.type == "cuda" else no_wait


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("layer", range(3))
def test_kernels_equal_their_twins(seed: int, layer: int) -> None:
    fast, slow = twins(seed)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model, state, following = world.model, world.layers[layer], world.layers[(layer + 1) % 3]
        ops.vote(model, state, following, timeout_ns=TIMEOUT_NS, wait=no_wait if ops is plain else WAIT)
        ops.settle(model, following, torch.stack([state.message[state.experts :]] * 2), ranks=2)
        ops.fold(model, state, torch.stack([state.counts] * 3), decay=0.95)
        ops.take_over(model, following)
        ops.hand_over(model, state, delay=1 + seed % 2)
    assert_equal(fast, slow)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("layers", [1, 3])
def test_settling_and_folding_at_once_is_both(layers: int, seed: int, ranks: int) -> None:
    fast, slow = twins(seed, layers=layers)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model, state, following = world.model, world.layers[0], world.layers[1 % layers]
        ops.vote(model, state, following, timeout_ns=TIMEOUT_NS, wait=no_wait if ops is plain else WAIT)
        if ops is plain:
            ops.settle(model, following, state.message[state.experts :].unsqueeze(0), ranks=ranks)
            ops.fold(model, state, state.message[: state.experts].unsqueeze(0), decay=0.95)
        else:
            ops.settle_and_fold(model, state, following, state.message, ranks=ranks, decay=0.95)
    assert_equal(fast, slow)


@pytest.mark.parametrize("seed", range(20))
def test_only_equal_votes_of_all_ranks_agree(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    fast, slow = twins(0, layers=2)
    for world in (fast, slow):
        world.model.due[1], world.model.decision[1] = 5, -1
    votes = []
    for _ in range(4):
        high, low = (int(v) for v in torch.randint(0, 2, (2,), generator=draw))
        ready = int(torch.rand(1, generator=draw) > 0.1)
        votes.append([ready, *(ready * v for v in (high, high * high, low, low * low))])
    lanes = torch.tensor(votes, dtype=torch.int64, device=DEVICE)
    for world, ops in ((fast, triton_control), (slow, plain)):
        ops.settle(world.model, world.layers[1], lanes, ranks=4)
    assert_equal(fast, slow)
    expected = all(v[0] for v in votes) and len({tuple(v) for v in votes}) == 1
    assert int(slow.model.decision[1]) == expected


@pytest.mark.parametrize("window", [1, 3])
def test_the_load_is_that_of_the_hosts_window(window: int) -> None:
    from moe_eplb.balancer.statistics import LoadWindow

    draw = torch.Generator().manual_seed(window)
    world, host = World.make(1, 100, 100, 50, window), LoadWindow(100, decay=0.95, window=window)
    world.model.turn[1] = 1
    for _ in range(7):
        counts = torch.randint(0, 1 << 20, (2, 100), generator=draw)
        triton_control.fold(world.model, world.layers[0], counts.to(DEVICE), decay=0.95)
        host.fold(counts.sum(0))
    assert torch.equal(world.layers[0].load.cpu().double(), torch.from_numpy(host.take()))


def test_a_wait_in_vain_ends_and_is_not_repeated() -> None:
    world = World.make(2, 8, 8, 4)
    world.model.due[1] = 0
    waits = []

    def wait(layer: int, due: int, timeout_ns: int) -> int:
        waits.append(timeout_ns)
        return timeout_ns

    for ops in (triton_control, triton_control) if DEVICE.type == "cuda" else (plain, plain):
        ops.vote(world.model, *world.layers, timeout_ns=TIMEOUT_NS, wait=None if DEVICE.type == "cuda" else wait)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            waits.append(int(world.model.report(1, 0)[Report.WAITED_NS]))
    assert waits[0] >= TIMEOUT_NS
    assert waits[1] < TIMEOUT_NS / 10
    assert int(world.model.report(1, 0)[Report.READY_HERE]) == 0
    assert world.layers[0].message.cpu().tolist() == [0] * (8 + LANES)


def test_a_plan_moves_tables_and_cells_together_or_not_at_all() -> None:
    for agreed, outcome in ((1, Outcome.COMMITTED), (0, Outcome.DROPPED)):
        world = World.make(1, 4, 6, 3)
        state = world.layers[0]
        before = [state.tables.clone(), state.cells.clone()]
        state.pending.fill_(7)
        world.model.turn[0], world.model.due[0], world.model.decision[0] = 3, 3, agreed
        triton_control.take_over(world.model, state)
        changed = [not torch.equal(a, b) for a, b in zip(before, (state.tables, state.cells), strict=True)]
        assert changed == [bool(agreed)] * 2
        assert int(world.model.report(0, 3)[Report.OUTCOME]) == outcome
        assert world.model.committed.tolist() == [3 if agreed else -1]
        assert int(world.model.stages[0, Stage.TAKE_OVER]) == 3


def test_a_count_beyond_int32_is_told() -> None:
    world = World.make(1, 4, 4, 4)
    world.layers[0].counts[2] = -5
    triton_control.vote(world.model, world.layers[0], world.layers[0], timeout_ns=0, wait=WAIT)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert world.model.overflow.tolist() == [1]
