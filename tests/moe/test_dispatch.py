"""All dispatches against sums computed in one process, with ragged and empty ranks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device, ops
from moe_eplb.moe.dispatch import AllGather, AllToAll, Dispatcher, Received, SymmMem
from moe_eplb.moe.grouping import entries_of, sum_over_k
from tests.support.ranks import run_ranks

HIDDEN, TOP_K, PER_RANK = 8, 3, 3
CASES = {1: ([5], [0]), 2: ([4, 7], [0, 3], [0, 0]), 4: ([3, 0, 5, 1], [0, 0, 0, 0], [2, 2, 2, 2])}
"""Tokens of each rank, by number of ranks."""


class Inputs(NamedTuple):
    """What one rank hands to a dispatch."""

    x: torch.Tensor
    slots: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor
    riders: torch.Tensor


class Outputs(NamedTuple):
    """What one rank got out of it: entries are (source rank, token, k, global slot)."""

    y: torch.Tensor
    entries: list[tuple[int, int, int, int]]
    riders: list[list[int]]
    ids: torch.Tensor | None
    sizes: tuple[int, int, int]


def _inputs(rank: int, size: int, tokens: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(100 * size + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    order = torch.rand(tokens, PER_RANK * size, generator=generator).argsort(dim=1)
    slots = order[:, :TOP_K].int()
    if tokens > 1:
        slots[1, 2] = PER_RANK * size  # what routing gives for an id that is no expert
        slots[0] = -1
    scales = torch.rand(tokens, TOP_K, generator=generator)
    return Inputs(x, slots, slots // 2, scales, torch.tensor([rank, 10**12 + tokens]))


def _expert(rows: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    return rows.float() * (slot + 1).unsqueeze(1) + slot.unsqueeze(1)


def _dispatcher(kind: str, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Dispatcher:
    """`kind`: "alltoall", "allgather", "ids" for an all-gather of ids too, "symm_mem"; after a hyphen, "static"."""
    name, _, shapes = kind.partition("-")
    sizes: dict[str, Any] = {"slots_per_rank": PER_RANK, "hidden_size": HIDDEN, "top_k": TOP_K, "dtype": dtype}
    sizes["static_shapes"] = shapes == "static"
    if name == "symm_mem":
        symmetric = None if group is None else get_device("cpu", NullSink()).symmetric(group)
        return SymmMem(group, symmetric=symmetric, **sizes)
    return AllToAll(group, **sizes) if name == "alltoall" else AllGather(group, **sizes, gather_ids=name == "ids")


def _forward(dispatcher: Dispatcher, rank: int, given: Inputs, tokens: list[int]) -> Outputs:
    exchange = dispatcher.prepare(given.slots, given.ids, given.riders, tokens)
    received = exchange.dispatch(given.x, given.scales)
    one_rank = isinstance(dispatcher, SymmMem) and dispatcher.ranks.size == 1  # which sends nothing and counts nothing
    assert (received.entries is None) == (dispatcher.static_shapes or one_rank)
    share = received.slots.numel() // dispatcher.ranks.size
    assert received.likely_entries == (share if received.entries is None else received.entries)
    rows, position, offs = ops.permute_rows(
        received.hidden, received.slots, PER_RANK, None, received.entries, first_slot=received.first_slot
    )
    entries = entries_of(received.local_slots, position, offs)
    assert received.entries in (None, len(entries.row))
    slot = entries.slot + rank * PER_RANK
    # Rows that no entry has must not show anywhere.
    output = torch.full((len(rows), HIDDEN), float("nan"))
    output[: len(slot)] = _expert(rows[: len(slot)], slot)
    y = exchange.combine(sum_over_k(output, position, received.scales, exchange.partial_dtype))
    columns = (received.source_rank()[entries.row], received.token()[entries.row], entries.k, slot)
    found = [tuple(entry) for entry in torch.stack([c.long() for c in columns], dim=1).tolist()]
    assert exchange.riders is not None
    sizes = (dispatcher.prepare_bytes(given.riders, tokens), exchange.dispatch_bytes, exchange.combine_bytes)
    return Outputs(y, found, exchange.riders.tolist(), received.expert_ids, sizes)


def _rank(rank: int, size: int, kind: str, dtype: torch.dtype) -> list[Outputs]:
    group = dist.group.WORLD if size > 1 else None
    dispatcher = _dispatcher(kind, group, dtype)
    return [_forward(dispatcher, rank, _inputs(rank, size, case[rank], dtype), case) for case in CASES[size]]


@functools.cache
def _run(size: int, kind: str, dtype: torch.dtype) -> list[list[Outputs]]:
    """Outputs by case and rank."""
    by_rank = [_rank(0, 1, kind, dtype)] if size == 1 else run_ranks(_rank, size, kind, dtype)
    return [list(case) for case in zip(*by_rank, strict=True)]


def _wanted(given: Inputs, size: int) -> torch.Tensor:
    y = torch.zeros(given.x.shape[0], HIDDEN)
    for token, slots in enumerate(given.slots.tolist()):
        for k, slot in enumerate(slots):
            if 0 <= slot < PER_RANK * size:
                y[token] += given.scales[token, k] * _expert(given.x[token : token + 1], torch.tensor([slot]))[0]
    return y


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "kind", ["alltoall", "allgather", "symm_mem", "alltoall-static", "allgather-static", "symm_mem-static"]
)
def test_every_entry_is_processed_once_by_its_slot_and_comes_back(kind: str, size: int) -> None:
    for tokens, outputs in zip(CASES[size], _run(size, kind, torch.float32), strict=True):
        given = [_inputs(rank, size, tokens[rank], torch.float32) for rank in range(size)]
        wanted = {
            (rank, token, k, slot)
            for rank, inputs in enumerate(given)
            for token, slots in enumerate(inputs.slots.tolist())
            for k, slot in enumerate(slots)
            if 0 <= slot < PER_RANK * size
        }
        got = [entry for output in outputs for entry in output.entries]
        assert len(got) == len(wanted)
        assert set(got) == wanted
        for rank, output in enumerate(outputs):
            assert all(slot // PER_RANK == rank for _, _, _, slot in output.entries)
            assert output.entries == sorted(output.entries, key=lambda entry: (entry[3], entry[0], entry[1], entry[2]))
            torch.testing.assert_close(output.y, _wanted(given[rank], size), rtol=1e-5, atol=1e-5)
            assert output.riders == [inputs.riders.tolist() for inputs in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["alltoall", "allgather", "symm_mem"])
def test_static_shapes_give_the_same_as_exchanged_sizes(kind: str, size: int, dtype: torch.dtype) -> None:
    """Ragged and empty ranks; the exact dispatch is the twin."""
    for exact, static in zip(_run(size, kind, dtype), _run(size, f"{kind}-static", dtype), strict=True):
        for wanted, got in zip(exact, static, strict=True):
            assert torch.equal(got.y, wanted.y)
            assert got.y.dtype is wanted.y.dtype
            assert got.entries == wanted.entries
            assert got.riders == wanted.riders


@pytest.mark.parametrize("kind", ["alltoall", "allgather", "symm_mem"])
def test_bfloat16_states_arrive_unchanged_and_sum_in_float32(kind: str) -> None:
    for tokens, outputs in zip(CASES[2], _run(2, kind, torch.bfloat16), strict=True):
        for rank, output in enumerate(outputs):
            wanted = _wanted(_inputs(rank, 2, tokens[rank], torch.bfloat16), 2)
            assert output.y.dtype == torch.bfloat16
            torch.testing.assert_close(output.y.float(), wanted, rtol=2e-2, atol=2e-2)


def test_allgather_brings_the_ids_of_real_tokens_only_when_asked() -> None:
    both = zip(
        [*CASES[2], *CASES[2]], _run(2, "ids", torch.float32) + _run(2, "ids-static", torch.float32), strict=True
    )
    for tokens, outputs in both:
        wanted = torch.cat([_inputs(rank, 2, tokens[rank], torch.float32).ids for rank in range(2)])
        for output in outputs:
            assert output.ids is not None
            assert torch.equal(output.ids, wanted)
    assert all(output.ids is None for outputs in _run(1, "allgather", torch.float32) for output in outputs)


def test_byte_counts_are_those_of_the_rows_sent() -> None:
    row = 4 * (HIDDEN + TOP_K)
    for tokens, outputs in zip(CASES[2], _run(2, "alltoall", torch.float32), strict=True):
        for rank, output in enumerate(outputs):
            slots = _inputs(rank, 2, tokens[rank], torch.float32).slots
            sent = sum(len({s // PER_RANK for s in line if 0 <= s < 2 * PER_RANK}) for line in slots.tolist())
            back = len({(source, token) for source, token, _, _ in output.entries})
            assert output.sizes == (8 * 4, sent * (row + 4 * TOP_K + 4), back * 4 * HIDDEN)
    for tokens, outputs in zip(CASES[2], _run(2, "allgather", torch.float32), strict=True):
        block = max(tokens)
        assert {output.sizes for output in outputs} == {(8 * 3, block * (row + 4 * TOP_K), 2 * block * 4 * HIDDEN)}
    # Rows are rounded up to 64 bytes; only riders ride, apart or in a row of the all-gather.
    for kind, apart, more in (("alltoall", 8 * 2, 0), ("allgather", 0, 1)):
        for tokens, outputs in zip(CASES[2], _run(2, f"{kind}-static", torch.float32), strict=True):
            block = max(tokens) + more
            assert {output.sizes for output in outputs} == {(apart, block * 64, 2 * block * 4 * HIDDEN)}
    # Rows are rounded up to 64 bytes; all of every block travel.
    for tokens, outputs in zip(CASES[2], _run(2, "symm_mem", torch.float32), strict=True):
        assert {output.sizes for output in outputs} == {(8 * 2, 2 * max(tokens) * 128, 2 * max(tokens) * 64)}
    for kind in ("alltoall", "allgather", "symm_mem"):
        assert {output.sizes for case in _run(1, kind, torch.float32) for output in case} == {(0, 0, 0)}


def test_riders_that_no_row_has_room_for_go_apart() -> None:
    dispatcher = _dispatcher("allgather-static", None, torch.float32)
    dispatcher.ranks.size = 2
    for riders, tokens, wanted in ((HIDDEN // 2, [4, 4], 0), (HIDDEN // 2 + 1, [4, 4], 8 * (HIDDEN // 2 + 1))):
        assert dispatcher.prepare_bytes(torch.zeros(riders, dtype=torch.int64), tokens) == wanted
    assert dispatcher.prepare_bytes(torch.zeros(1, dtype=torch.int64), None) == 8 * 2


def test_without_riders_there_are_none() -> None:
    given = _inputs(0, 1, 2, torch.float32)
    for kind in ("alltoall", "allgather", "symm_mem", "alltoall-static", "allgather-static"):
        assert _dispatcher(kind, None, torch.float32).prepare(given.slots, given.ids, None, [2]).riders is None


def test_static_shapes_without_the_tokens_of_all_ranks_exchange_them() -> None:
    given = _inputs(0, 1, 4, torch.float32)
    for kind in ("alltoall-static", "allgather-static"):
        dispatcher = _dispatcher(kind, None, torch.float32)
        received = dispatcher.prepare(given.slots, given.ids, None).dispatch(given.x, given.scales)
        assert received.entries == int(((given.slots >= 0) & (given.slots < PER_RANK)).sum())


def _forget_waiting(kind: str, monkeypatch: pytest.MonkeyPatch) -> Received:
    """Dispatch, grouping and combine of one rank with everything that waits for a device forbidden."""
    given = _inputs(0, 1, 4, torch.bfloat16)
    dispatcher = _dispatcher(kind, None, torch.bfloat16)
    for name in ("item", "tolist", "nonzero", "repeat_interleave", "__int__", "__bool__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, _waits)
    monkeypatch.setattr(torch, "tensor", _waits)
    exchange = dispatcher.prepare(given.slots, given.ids, given.riders, [4])
    received = exchange.dispatch(given.x, given.scales)
    rows, position, _ = ops.permute_rows(received.hidden, received.local_slots, PER_RANK)
    y = exchange.combine(sum_over_k(rows, position, received.scales, exchange.partial_dtype))
    monkeypatch.undo()
    assert y.shape == given.x.shape
    return received


def _waits(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("waits for the device")


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
def test_nothing_waits_for_the_device_where_shapes_are_static(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _forget_waiting(f"{kind}-static", monkeypatch).entries is None
    with pytest.raises(AssertionError, match="waits"):
        _forget_waiting(kind, monkeypatch)
