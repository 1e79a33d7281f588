"""Every Triton kernel equals its plain twin; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from moe_eplb.device.ops import plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from moe_eplb.device.ops import triton_ops  # noqa: E402

EXPERTS = (1, 8, 64, 129, 256, 1000)


def _ids(entries: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Skewed ids [T, 2], some of them outside [0, E) on either side."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(entries, 2, generator=generator) ** 2 * (experts + 2)).int() - 1
    return ids.to(DEVICE)


@pytest.mark.parametrize("entries", [0, 1, 700, 1500])
@pytest.mark.parametrize("experts", EXPERTS)
def test_histogram(entries: int, experts: int) -> None:
    ids = _ids(entries, experts)
    counts = [torch.full((experts,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    plain.histogram(ids, counts[0])
    triton_ops.histogram(ids, counts[1])
    assert counts[0].tolist() == counts[1].tolist()
    assert int(counts[0].sum()) - 3 * experts == int(((ids >= 0) & (ids < experts)).sum())


def test_histogram_writes_nothing_beyond_the_counts() -> None:
    memory = torch.zeros(131, dtype=torch.int32, device=DEVICE)
    triton_ops.histogram(_ids(900, 129), memory[1:130])
    assert memory[0] == memory[130] == 0


def _tables(experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    owner = torch.cat((torch.arange(experts), torch.randint(0, experts, (slots - experts,)))).sort().values
    count = torch.bincount(owner, minlength=experts).int()
    start = (count.cumsum(0) - count).int()
    return count.to(DEVICE), start.to(DEVICE), torch.randperm(slots).int().to(DEVICE)


@pytest.mark.parametrize("entries", [0, 5, 600, 1600])
@pytest.mark.parametrize("experts", EXPERTS)
def test_route(entries: int, experts: int) -> None:
    torch.manual_seed(experts)
    tables = _tables(experts, experts + 7)
    ids = _ids(entries, experts)
    wanted = plain.route(ids, *tables, offset=3, invalid=experts + 7)
    assert triton_ops.route(ids, *tables, offset=3, invalid=experts + 7).tolist() == wanted.tolist()


@pytest.mark.parametrize("rows", [0, 3, 520, 1100])
@pytest.mark.parametrize("slots", [1, 5, 36, 130])
def test_permute(rows: int, slots: int) -> None:
    local = _ids(rows, slots)
    position, offs = plain.permute(local, slots)
    fast_position, fast_offs = triton_ops.permute(local, slots)
    assert fast_offs.tolist() == offs.tolist()
    assert fast_position.tolist() == position.tolist()
    placed = position[position >= 0]
    assert sorted(placed.tolist()) == list(range(len(placed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (7, 768), (3, 1100)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    wanted, found = plain.swiglu(x), triton_ops.swiglu(x)
    assert found.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (40, 300), (9, 2048)])
def test_combine(rows: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    local = torch.randint(-1, 6, (rows, 4), generator=generator).to(DEVICE)
    position, offs = plain.permute(local, 6)
    output = torch.randn(int(offs[-1]), width, generator=generator).to(dtype).to(DEVICE)
    scales = torch.rand(rows, 4, generator=generator).to(DEVICE)
    wanted, found = plain.combine(output, position, scales), triton_ops.combine(output, position, scales)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    for row in range(min(rows, 3)):
        mine = [float(scales[row, k]) * output[position[row, k]].float() for k in range(4) if position[row, k] >= 0]
        assert torch.allclose(
            found[row], torch.stack(mine).sum(0) if mine else torch.zeros(width, device=DEVICE), atol=1e-4
        )
