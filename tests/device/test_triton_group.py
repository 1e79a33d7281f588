"""The kernels that group entries equal their plain twins; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from moe_eplb.device.ops import Parts, plain
from moe_eplb.device.ops.plain_parts import most_parts, parts_of
from tests.support.kernel_inputs import randn, skewed_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from moe_eplb.device.ops import triton_group, triton_group_few, triton_ops  # noqa: E402

BOTH = [torch.float32, torch.bfloat16]


def _cells(slots: int, cells: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(slots)
    return torch.randperm(cells, generator=generator)[:slots].int().to(DEVICE)


@pytest.mark.parametrize("spare", [None, 0, 3])
@pytest.mark.parametrize("rows", [0, 3, 520, 1100])
@pytest.mark.parametrize("slots", [1, 5, 36, 130])
def test_permute(rows: int, slots: int, spare: int | None) -> None:
    local = skewed_ids(rows, slots, top_k=3)
    groups = slots + (spare or 0)
    cells = None if spare is None else _cells(slots, groups)
    position, offs = plain.permute(local, groups, cells)
    fast_position, fast_offs = triton_ops.permute(local, groups, cells)
    assert fast_offs.tolist() == offs.tolist()
    assert fast_position.tolist() == position.tolist()
    placed = position[position >= 0]
    assert sorted(placed.tolist()) == list(range(len(placed)))
    assert len(placed) == int(((local >= 0) & (local < slots)).sum())


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("spare", [None, 3])
@pytest.mark.parametrize("first", [1, 5, 2000])
def test_slots_are_counted_from_the_first(
    monkeypatch: pytest.MonkeyPatch, first: int, spare: int | None, small: int
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    local, groups = skewed_ids(37, 20, top_k=8), 20 + (spare or 0)
    given, cells = (local + first).int(), None if spare is None else _cells(20, groups)
    hidden = randn(37, 24, dtype=torch.float32)
    wanted = plain.permute_rows(hidden, local, groups, cells)
    for twin in (plain, triton_ops):
        found = twin.permute_rows(hidden, given, groups, cells, first_slot=first)
        position, offs = twin.permute(given, groups, cells, first)
        last = int(offs[-1])
        assert found[1].tolist() == position.tolist() == wanted[1].tolist()
        assert found[2].tolist() == offs.tolist() == wanted[2].tolist()
        assert torch.equal(found[0][:last], wanted[0][:last])


def test_a_cell_that_does_not_exist_takes_nothing() -> None:
    local, cells = skewed_ids(40, 3), torch.tensor([1, 7, -1], dtype=torch.int32, device=DEVICE)
    for twin in (plain, triton_ops):
        position, offs = twin.permute(local, 5, cells)
        assert torch.equal(position >= 0, local == 0)
        assert offs.tolist() == [0] + [int((local == 0).sum())] * 4


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("rows", "top_k", "width", "slots", "spare"),
    [
        (0, 2, 8, 4, None),
        (1, 1, 8, 1, 0),
        (37, 8, 64, 20, 2),
        (50, 3, 300, 33, None),
        (40, 8, 24, 7, 3),
        (40, 8, 24, 16, None),
        (40, 8, 24, 29, 3),
    ],
)
def test_permute_rows(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    top_k: int,
    width: int,
    slots: int,
    spare: int | None,
    dtype: torch.dtype,
    small: int,
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    monkeypatch.setattr(triton_group_few, "_CHUNK", 64)  # so that few entries are several chunks
    local, groups = skewed_ids(rows, slots, top_k=top_k), slots + (spare or 0)
    cells = None if spare is None else _cells(slots, groups)
    hidden = randn(rows, width + 5, dtype=dtype)[:, :width]  # rows with a stride, as they come out of a collective
    for entries in (None, int(((local >= 0) & (local < slots)).sum())):
        wanted_rows, wanted, offs = plain.permute_rows(hidden, local, groups, cells, entries)
        found_rows, found, found_offs = triton_ops.permute_rows(hidden, local, groups, cells, entries)
        assert found.tolist() == wanted.tolist()
        assert found_offs.tolist() == offs.tolist()
        assert found_rows.shape == wanted_rows.shape == (local.numel() if entries is None else entries, width)
        assert torch.equal(found_rows[: int(offs[-1])], wanted_rows[: int(offs[-1])])


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize(
    ("rows", "top_k", "slots", "part"),
    [(0, 2, 4, 16), (1, 1, 1, 16), (37, 8, 20, 16), (90, 1, 2, 32), (80, 4, 70, 64), (37, 8, 16, 16), (37, 8, 32, 16)],
)
def test_permute_in_parts(
    monkeypatch: pytest.MonkeyPatch, rows: int, top_k: int, slots: int, part: int, small: int
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    monkeypatch.setattr(triton_group_few, "_CHUNK", 64)
    local, cells = skewed_ids(rows, slots, top_k=top_k), _cells(slots, slots + 3)
    hidden, given = randn(rows, 24, dtype=torch.float32), (local + 5).int()
    for entries in (None, int(((local >= 0) & (local < slots)).sum())):
        wanted_rows, wanted, offs, wanted_parts = plain.permute_in_parts(hidden, local, cells, part, entries)
        found_rows, found, found_offs, parts = triton_ops.permute_in_parts(
            hidden, given, cells, part, entries, first_slot=5
        )
        assert found.tolist() == wanted.tolist()
        assert found_offs.tolist() == offs.tolist()
        last = int(offs[-1])
        assert torch.equal(found_rows[:last], wanted_rows[:last])
        _assert_same_parts(parts, wanted_parts)
    if rows > 1:  # fewer places than entries
        strided = cells.repeat_interleave(2)[::2]
        *_, offs, parts = triton_ops.permute_in_parts(hidden, local, strided, part, 10)
        _assert_same_parts(parts, parts_of(offs, cells, part, 10))


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("entries", [None, 20])
def test_nothing_is_written_beside_the_parts(monkeypatch: pytest.MonkeyPatch, entries: int | None, small: int) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    local = torch.tensor([0, 0, 2] * 20, dtype=torch.int32, device=DEVICE).view(-1, 1)
    lines = 1 + most_parts(60 if entries is None else entries, 3, 16)
    memory = torch.full((lines + 8, 4), -77, dtype=torch.int32, device=DEVICE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory[4:-4] if size == (lines, 4) else empty(*size, **kw))
    cells = torch.arange(3, dtype=torch.int32, device=DEVICE)
    *_, parts = triton_ops.permute_in_parts(randn(60, 8), local, cells, 16, entries)
    count = int(parts.table[0, 0])
    assert count == (5 if entries is None else 2)
    assert memory[4 + 1 + count :].eq(-77).all()
    assert memory[:4].eq(-77).all()


def _assert_same_parts(found: Parts, wanted: Parts) -> None:
    count = int(wanted.table[0, 0])
    assert found.table.shape == wanted.table.shape
    assert (found.rows, int(found.table[0, 0])) == (wanted.rows, count)
    assert found.table[1 : 1 + count].tolist() == wanted.table[1 : 1 + count].tolist()


@pytest.mark.parametrize("small", [0, 4096])
def test_permute_rows_writes_nothing_beyond_its_rows(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """Fewer places are given than there are entries, inside memory that shows every other write."""
    monkeypatch.setattr(triton_group, "_SMALL", small)
    memory = torch.zeros(30, 8, device=DEVICE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory[5:15] if size == (10, 8) else empty(*size, **kw))
    local = torch.zeros(20, 1, dtype=torch.int32, device=DEVICE)
    triton_ops.permute_rows(torch.ones(20, 8, device=DEVICE), local, 2, None, 10)
    assert memory.sum(dim=1).tolist() == [0.0] * 5 + [8.0] * 10 + [0.0] * 15
