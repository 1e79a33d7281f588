"""The balancer's steps on the device: kernels against their plain twins, on states that a run goes through."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from moe_eplb.device.control import LANES, LayerStack, LayerState, ModelState, Outcome, Report, Stage, plain, plain_all

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
triton_control = pytest.importorskip("moe_eplb.device.control.triton_control")
triton_all = pytest.importorskip("moe_eplb.device.control.triton_all")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIMEOUT_NS = 20_000_000


def visible(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=DEVICE.type == "cuda")


@dataclasses.dataclass
class World:
    """A model of L layers, whose states are rows of a stack in every world but those of one layer."""

    model: ModelState
    layers: list[LayerState]
    stack: LayerStack | None = None

    @staticmethod
    def make(layers: int, experts: int, slots: int, per_rank: int, window: int = 1) -> World:
        model = ModelState.make(layers, DEVICE, visible)
        model.turn[0] = 0
        tables = [torch.arange(2 * experts + slots, dtype=torch.int32, device=DEVICE) for _ in range(layers)]
        cells = [torch.arange(per_rank, dtype=torch.int32, device=DEVICE) for _ in range(layers)]
        if layers == 1:
            return World(model, [LayerState.make(0, experts, tables[0], cells[0], window, visible)])
        stack = LayerStack.make(layers, experts, window, DEVICE, visible)
        for parts in zip(tables, cells, strict=True):
            stack.add(*parts)
        return World(model, stack.states, stack)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"model.{f.name}": getattr(self.model, f.name) for f in dataclasses.fields(self.model)}
        for state in self.layers:
            fields = [f.name for f in dataclasses.fields(state) if f.name != "layer"]
            found |= {f"{state.layer}.{name}": getattr(state, name) for name in fields}
        return found


def finish() -> None:
    """Return when the kernels have run; what they read or write may be touched from here on."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def assert_equal(fast: World, slow: World) -> None:
    finish()
    for (name, a), b in zip(fast.tensors().items(), slow.tensors().values(), strict=True):
        a, b = a.cpu().clone(), b.cpu().clone()
        if name == "model.reports":  # how long a wait took differs
            a[..., Report.WAITED_NS] = b[..., Report.WAITED_NS] = 0
        assert torch.equal(a, b), name


def twins(seed: int, layers: int = 3, experts: int = 37, slots: int = 44, window: int = 2) -> tuple[World, World]:
    """Two equal worlds in which pending plans, votes and loads are drawn."""
    # Not one and a copy of it: a copy of memory that host and device share is shared no more.
    sizes = layers, experts, slots, window
    return _drawn(seed, *sizes), _drawn(seed, *sizes)


def _drawn(seed: int, layers: int, experts: int, slots: int, window: int) -> World:
    draw = torch.Generator().manual_seed(seed)
    world = World.make(layers, experts, slots, slots // 2, window)
    model = world.model
    model.turn.copy_(torch.tensor([5, seed % 3 > 0, *torch.randint(0, 2, (layers,), generator=draw).tolist()]))
    if seed % 4 > 1:
        model.row(6).copy_(torch.tensor([6, seed % 2, *torch.randint(0, 2, (layers,), generator=draw).tolist()]))
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
    return world


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


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("last", [-1, 5, 6, 7, 1000])
@pytest.mark.parametrize("layers", [1, 3, 61])
def test_the_first_layer_takes_the_next_iterations_row_where_it_is_there(layers: int, last: int, written: bool) -> None:
    fast, slow = twins(0, layers=layers, experts=3, slots=4)
    row = torch.arange(last + written, last + written + 2 + layers)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model = world.model
        model.turn[0] = last
        before = model.turn.tolist()
        model.row(last + 1).copy_(row)
        for layer in world.layers[1:]:
            ops.take_over(model, layer)
        assert model.turn.tolist() == before
        ops.take_over(model, world.layers[0])
        assert model.turn.tolist() == (row.tolist() if written else before)
        assert int(model.stages[0, Stage.TAKE_OVER]) == last + written
    assert_equal(fast, slow)


@pytest.mark.parametrize("looked", [True, False])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("layers", [1, 61])
def test_a_row_that_was_seen_ahead_is_taken_and_one_that_was_not_yet_there_is_read(
    layers: int, written: bool, looked: bool
) -> None:
    fast, slow = twins(0, layers=layers, experts=3, slots=4)
    row, other = torch.arange(6, 8 + layers), torch.full((2 + layers,), 9)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model = world.model
        model.turn[0] = 5
        model.coming.copy_(torch.arange(5, 7 + layers))  # of the iteration under way
        if written:
            model.row(6).copy_(row)
        if looked:
            ops.look_ahead(model)
            finish()
        model.row(6).copy_(other if written and looked else row)
        ops.take_over(model, world.layers[0])
        assert model.turn.tolist() == row.tolist()
        assert int(model.begun) == 6
    assert_equal(fast, slow)


@pytest.mark.parametrize("kept", [2, 3, 8])
def test_rows_are_taken_one_after_the_other(kept: int) -> None:
    fast, slow = twins(0)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model = world.model
        model.turn[0], model.due[:] = -1, -1
        model.turns, model.reports = visible((kept, 5), torch.int64), model.reports[:kept]
        model.turns.fill_(-1)
        for iteration in range(7):
            model.row(iteration).copy_(torch.tensor([iteration, iteration % 2, 1, 0, iteration]))
            ops.take_over(model, world.layers[0])
            assert model.turn.tolist() == [iteration, iteration % 2, 1, 0, iteration]
        ops.take_over(model, world.layers[0])
        assert int(model.turn[0]) == 6, "nobody has written the next row"


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


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("layers", [1, 3])
def test_voting_and_folding_at_once_is_both(layers: int, seed: int) -> None:
    fast, slow = twins(seed, layers=layers)
    for world, ops in ((fast, triton_control), (slow, plain)):
        model, state, following = world.model, world.layers[0], world.layers[1 % layers]
        model.due[following.layer], model.decision[following.layer] = 5 + (following.layer == 0), -1
        model.ready[following.layer] = 9 if seed % 2 else -1
        following.lanes.copy_(torch.tensor([1, 3, 9, seed, seed**2]))
        state.counts[seed % state.experts] = -5 if seed % 5 == 0 else 5
        if ops is plain:
            ops.vote(model, state, following, timeout_ns=TIMEOUT_NS, wait=no_wait)
            ops.settle_and_fold(model, state, following, state.message, ranks=1, decay=0.95)
        else:
            ops.vote_and_fold(model, state, following, timeout_ns=TIMEOUT_NS, wait=WAIT, decay=0.95)
        assert int(model.decision[following.layer]) == seed % 2
    assert_equal(fast, slow)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(24))
def test_steps_of_all_layers_equal_their_twins(seed: int, ranks: int) -> None:
    fast, slow = twins(seed, layers=4)
    for world in (fast, slow):
        world.model.due[seed % 4] = world.model.due[(seed // 4) % 4] = 6  # what is due next is what is voted on
        world.model.decision[seed % 4] = -1
        world.layers[(seed + 1) % 4].counts[3] = -5 if seed % 5 == 0 else 5
    for world, ops in ((fast, triton_all), (slow, plain_all)):
        model, stack = world.model, world.stack
        ops.vote_all(model, stack, timeout_ns=TIMEOUT_NS, wait=no_wait if ops is plain_all else WAIT)
        stack.message.mul_(ranks)
        ops.settle_and_fold_all(model, stack, ranks=ranks, decay=0.95)
        ops.hand_over_all(model, stack, delay=2 + seed % 2)
    assert_equal(fast, slow)
    assert slow.model.stages[:, Stage.VOTE :].tolist() == [[5] * 3] * 4
    assert int(slow.model.bell) == int(slow.model.turn[2:].sum()), "one ring for each turn"


@pytest.mark.parametrize("seed", range(8))
def test_a_step_of_all_layers_is_the_step_of_each(seed: int) -> None:
    fast, slow = twins(seed, layers=3)
    for world in (fast, slow):
        world.model.due[seed % 3], world.model.decision[seed % 3] = 6, -1
    stack = fast.stack
    triton_all.vote_all(fast.model, stack, timeout_ns=TIMEOUT_NS, wait=WAIT)
    triton_all.settle_and_fold_all(fast.model, stack, ranks=1, decay=0.95)
    triton_all.hand_over_all(fast.model, stack, delay=3)
    for state in slow.layers:
        plain.vote(slow.model, state, state, timeout_ns=TIMEOUT_NS, wait=no_wait, early=True)
    for state in slow.layers:
        plain.settle(slow.model, state, state.message[None, state.experts :], ranks=1, early=True)
        triton_control.fold(slow.model, state, state.message[None, : state.experts], decay=0.95)
        triton_control.hand_over(slow.model, state, delay=3)
    assert_equal(fast, slow)


def test_the_votes_of_all_layers_wait_in_vain_together() -> None:
    world = World.make(5, 8, 8, 4)
    model, stack = world.model, world.stack
    assert stack is not None
    model.due[:] = torch.tensor([1, 1, 2, 1, -1])
    model.ready[3] = 1
    waits = []

    def wait(layer: int, due: int, timeout_ns: int) -> int:
        waits.append((layer, timeout_ns))
        return timeout_ns

    on_gpu = DEVICE.type == "cuda"
    (triton_all if on_gpu else plain_all).vote_all(model, stack, timeout_ns=TIMEOUT_NS, wait=None if on_gpu else wait)
    if on_gpu:
        torch.cuda.synchronize()
        assert TIMEOUT_NS <= int(model.reports[1, :, Report.WAITED_NS].max()) < 2 * TIMEOUT_NS, "beside each other"
    else:
        assert waits == [(0, TIMEOUT_NS), (1, 0), (3, 0)], "one wait in vain, and nobody waits for what is due later"
    assert int(model.overdue) == 1
    assert [int(model.report(layer, 1)[Report.READY_HERE]) for layer in (0, 1, 3)] == [0, 0, 1]
    assert model.reports[:, [2, 4]].max() == -1, "nothing is voted on there"


def test_the_bell_rings_for_each_layer_once_and_in_their_order() -> None:
    """The host tells by the number of rings whose load is there: what is handed over first is rung first."""
    fast, slow = World.make(3, 4, 4, 4), World.make(3, 4, 4, 4)
    for world, ops in ((fast, triton_all), (slow, plain_all)):
        world.model.turn.copy_(torch.tensor([7, 1, 1, 0, 1]))
        world.model.due[2] = 8  # it keeps its load, and rings all the same
        for state in world.layers:
            state.load.fill_(state.layer + 1.0)
        ops.hand_over_all(world.model, world.stack, delay=2)
    assert_equal(fast, slow)
    assert slow.model.bell.tolist() == [2]
    assert [int(state.handed) for state in slow.layers] == [7, -1, -1]
    assert slow.model.due.tolist() == [9, -1, 8]
    assert [state.load.tolist() for state in slow.layers] == [[0.0] * 4, [2.0] * 4, [3.0] * 4]


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
    finish()
    assert world.model.overflow.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("least", "wanted"), [(-1, 1), (0, 0)])
def test_rows_of_counts_beyond_int32_are_told(least: int, wanted: int, dtype: torch.dtype) -> None:
    world = World.make(1, 4, 4, 4)
    rows = torch.full((3, 4), 2**31 - 1, dtype=dtype, device=DEVICE)
    rows[1, 3] = least
    triton_control.fold(world.model, world.layers[0], rows, decay=0.95)
    finish()
    assert world.model.overflow.tolist() == [wanted]
