"""Dispatch through symmetric memory: the bits of the all-to-all, rows that are stale or wrong, and no waits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device, ops
from moe_eplb.device.symmetric import HostSymmetric, Symmetric
from moe_eplb.moe.dispatch import AllToAll, Dispatcher, Received, SymmMem
from moe_eplb.moe.grouping import sum_over_k
from tests.support.ranks import run_ranks

HIDDEN, TOP_K, PER_RANK = 8, 3, 3
STEPS = {
    2: ([6, 7], [0, 3], [5, 0], [0, 0], [2, 7]),
    3: ([5, 1, 9], [0, 2, 1], [4, 4, 4]),
    4: ([3, 0, 5, 1], [9, 8, 7, 6], [0, 0, 0, 0], [1, 1, 1, 1]),
}
"""Tokens of each rank, forward by forward, in the same buffers: later ones find rows of earlier ones."""


class Inputs(NamedTuple):
    """What one rank hands to a dispatch."""

    x: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor


def _inputs(rank: int, size: int, tokens: int, step: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1000 * step + 10 * size + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    slots = torch.rand(tokens, PER_RANK * size, generator=generator).argsort(dim=1)[:, :TOP_K].int()
    if tokens > 1:
        slots[1, 2] = PER_RANK * size
        slots[0] = -1
    return Inputs(x, slots, torch.rand(tokens, TOP_K, generator=generator))


def _sizes(dtype: torch.dtype, static: bool) -> dict[str, Any]:
    sizes = {"slots_per_rank": PER_RANK, "hidden_size": HIDDEN, "top_k": TOP_K, "dtype": dtype}
    return sizes | {"static_shapes": static}


def _symm_mem(dtype: torch.dtype = torch.float32, *, static: bool = True) -> SymmMem:
    group = dist.group.WORLD
    assert group is not None
    return SymmMem(group, symmetric=get_device("cpu", NullSink()).symmetric(group), **_sizes(dtype, static))


def _forward(dispatcher: Dispatcher, rank: int, given: Inputs, tokens: list[int] | None) -> torch.Tensor:
    exchange = dispatcher.prepare(given.slots, given.slots, None, tokens)
    received = exchange.dispatch(given.x, given.scales)
    rows, position, offs = ops.permute_rows(received.hidden, received.local_slots, PER_RANK, None, received.entries)
    end = torch.arange(len(rows)).unsqueeze(1) < offs[-1]
    slot = torch.searchsorted(offs, torch.arange(len(rows)), right=True, out_int32=True) + rank * PER_RANK
    output = torch.where(end, rows.float() * (slot + 1).unsqueeze(1) + slot.unsqueeze(1), torch.nan).to(rows.dtype)
    return exchange.combine(sum_over_k(output, position, received.scales, exchange.partial_dtype))


# -- the same as the all-to-all --------------------------------------------------------------------------------------


def _both(rank: int, size: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Outputs by step of the all-to-all, then of two layers through symmetric memory, one with unknown sizes."""
    exact = AllToAll(dist.group.WORLD, **_sizes(dtype, False))
    layers = [_symm_mem(dtype), _symm_mem(dtype, static=False)]
    outputs = []
    for step, tokens in enumerate(STEPS[size]):
        given = _inputs(rank, size, tokens[rank], step, dtype)
        ours = [_forward(layer, rank, given, told) for layer, told in zip(layers, (tokens, None), strict=True)]
        outputs.append([_forward(exact, rank, given, None), *ours])
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_outputs_are_those_of_the_all_to_all_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    for rank, outputs in enumerate(run_ranks(_both, size, dtype)):
        for tokens, (wanted, *ours) in zip(STEPS[size], outputs, strict=True):
            assert wanted.shape == (tokens[rank], HIDDEN)
            assert wanted.isfinite().all()
            for y in ours:
                assert y.dtype is dtype
                assert torch.equal(y, wanted)


# -- what stays behind -----------------------------------------------------------------------------------------------


def _received(rank: int, size: int) -> tuple[Received, list[torch.Tensor]]:
    """What a rank got of a small forward after a large one, with copies taken before a third."""
    layer = _symm_mem()
    for step, tokens in enumerate(([9, 9], [1, 2])):
        given = _inputs(rank, size, tokens[rank], step, torch.float32)
        exchange = layer.prepare(given.slots, given.slots, None, tokens)
        received = exchange.dispatch(given.x, given.scales)
        before = [t.clone() for t in (received.slots, received.token(), received.source_rank())]
        exchange.combine(torch.zeros(2 * max(tokens), HIDDEN))
    given = _inputs(rank, size, 9, 2, torch.float32)
    _forward(layer, rank, given, [9, 9])
    return received, before


def test_stale_rows_have_no_slots_and_what_checks_look_at_is_not_overwritten() -> None:
    for rank, (received, before) in enumerate(run_ranks(_received, 2)):
        sent = []
        for source, tokens in enumerate((1, 2)):
            slots = _inputs(source, 2, tokens, 1, torch.float32).slots
            here = (slots >= rank * PER_RANK) & (slots < (rank + 1) * PER_RANK)
            sent += [(source, token) for token in range(tokens) if here[token].any()]
        used = (received.slots != -1).any(dim=1)
        assert 0 < int(used.sum()) == len(sent) < len(received.slots) == 4
        assert received.source_counts == (2, 2)
        origins = torch.stack((received.source_rank(), received.token()), dim=1)[used].tolist()
        assert [tuple(origin) for origin in origins] == sent
        for now, then in zip((received.slots, received.token(), received.source_rank()), before, strict=True):
            assert torch.equal(now, then)


def _emptier(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots in received lines when every token goes everywhere, and when none goes anywhere; hidden states stay."""
    layer, tokens = _symm_mem(), [4, 4]
    everywhere = torch.tensor([[0, PER_RANK, 1]] * 4, dtype=torch.int32)
    seen = []
    for slots in (everywhere, torch.full_like(everywhere, -1)):
        given = _inputs(rank, size, 4, 0, torch.float32)._replace(slots=slots)
        exchange = layer.prepare(given.slots, given.slots, None, tokens)
        received = exchange.dispatch(given.x, given.scales)
        y = exchange.combine(received.hidden.clone())
        seen.append(received.slots)
        assert torch.equal(y, 2 * given.x if slots is everywhere else torch.zeros_like(given.x))
    return seen[0], seen[1]


def test_lines_that_a_fuller_forward_used_are_marked_as_unused() -> None:
    for rank, (full, empty) in enumerate(run_ranks(_emptier, 2)):
        assert ((full >= 0) & (full < PER_RANK)).any(dim=1).all(), rank
        assert (empty == -1).all()


def _broken_off(rank: int, size: int) -> list[torch.Tensor]:
    """Outputs of a forward, of one after two that broke off between dispatch and combine, and of the one after it."""
    layer, tokens = _symm_mem(), [4, 3]
    given = _inputs(rank, size, tokens[rank], 0, torch.float32)
    outputs = [_forward(layer, rank, given, tokens)]
    for _ in range(2):
        layer.prepare(given.slots, given.slots, None, tokens).dispatch(given.x + 1, given.scales)
    return [*outputs, *(_forward(layer, rank, given, tokens) for _ in range(2))]


def test_a_forward_that_broke_off_leaves_nothing_behind() -> None:
    for first, *others in run_ranks(_broken_off, 2):
        assert all(torch.equal(other, first) for other in others)


# -- rows from wrong places ------------------------------------------------------------------------------------------


def _spoil(received: torch.Tensor, send: torch.Tensor, wrong: str) -> None:
    """Blocks of 6 lines, of which rank 0 uses the first of its own and leaves the last."""
    if wrong == "blocks swapped":
        received.copy_(received.roll(6, dims=0))
    elif wrong == "block of another rank":
        received[:6] = send[6:]
    else:
        received[:2] = received[[1, 0]] if wrong == "swapped" else received[[5, 5]]


def _with_wrong_rows(rank: int, size: int, exchange: int, wrong: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a right forward, and of one in which rank 0's rows of one exchange come from elsewhere."""
    layer, tokens = _symm_mem(), [6, 6]
    given = _inputs(rank, size, 6, 0, torch.float32)
    right = _forward(layer, rank, given, tokens)
    symmetric, numbers = layer.symmetric, iter(range(2))
    assert isinstance(symmetric, HostSymmetric)
    transfer = symmetric._exchange

    def corrupt(send: torch.Tensor, received: torch.Tensor) -> None:
        transfer(send, received)
        if next(numbers) == exchange and rank == 0:
            _spoil(received, send, wrong)

    symmetric._exchange = corrupt  # type: ignore[method-assign]
    return right, _forward(layer, rank, given, tokens)


def _goes_to(source: int, rank: int) -> torch.Tensor:
    slots = _inputs(source, 2, 6, 0, torch.float32).slots
    return ((slots >= PER_RANK * rank) & (slots < PER_RANK * (rank + 1))).any(dim=1)


@pytest.mark.parametrize("wrong", ["swapped", "unused", "blocks swapped", "block of another rank"])
@pytest.mark.parametrize("exchange", [0, 1])
def test_rows_from_wrong_places_give_nan_and_never_a_number(exchange: int, wrong: str) -> None:
    """Rank 0's first rows are its own: tokens 1 and on, since its token 0 goes nowhere."""
    (right, got), (other, same) = run_ranks(_with_wrong_rows, 2, exchange, wrong)
    hit, theirs = _goes_to(0, 0), torch.zeros(6, dtype=torch.bool)
    assert int(hit.sum()) < 6, "block 0 has no line that is left"
    if wrong in ("swapped", "unused"):
        hit[hit.nonzero().flatten()[2:]] = False
    elif wrong == "blocks swapped":  # what comes to rank 0, or returns to it
        theirs = _goes_to(1, 0) if exchange == 0 else theirs
        hit = hit if exchange == 0 else _goes_to(0, 0) | _goes_to(0, 1)
    for clean, spoiled, where in ((right, got, hit), (other, same, theirs)):
        assert spoiled[where].isnan().all()
        assert torch.equal(spoiled[~where], clean[~where])
        assert clean.isfinite().all()


# -- no waits --------------------------------------------------------------------------------------------------------


class Loopback(Symmetric):
    """Two ranks in one process, of which the other sends what this one would send to itself."""

    def _empty(self, shape: tuple[int, int]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    def _exchange(self, send: torch.Tensor, received: torch.Tensor) -> None:
        received.copy_(send)


class _Group:
    group_name = "two"

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


@pytest.fixture
def loopback() -> SymmMem:
    group: Any = _Group()
    return SymmMem(group, symmetric=Loopback(group, torch.device("cpu")), **_sizes(torch.bfloat16, True))


def _waits(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("waits for the device")


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_nothing_waits_for_the_device(loopback: SymmMem, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = _inputs(0, 2, tokens, 0, torch.bfloat16)
    for name in ("item", "tolist", "nonzero", "repeat_interleave", "__int__", "__bool__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, _waits)
    monkeypatch.setattr(torch, "tensor", _waits)
    exchange = loopback.prepare(given.slots, given.slots, None, [tokens, 5])
    received = exchange.dispatch(given.x, given.scales)
    rows, position, _ = ops.permute_rows(received.hidden, received.local_slots, PER_RANK)
    y = exchange.combine(sum_over_k(rows, position, received.scales, exchange.partial_dtype))
    monkeypatch.undo()
    assert (y.shape, received.entries, len(received.slots)) == (given.x.shape, None, 10)
