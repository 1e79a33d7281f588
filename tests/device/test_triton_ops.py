"""Every Triton kernel equals its plain twin; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from moe_eplb.device.ops import plain
from tests.support.kernel_inputs import randn, skewed_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from moe_eplb.device.ops import triton_ops  # noqa: E402

EXPERTS = (1, 8, 64, 129, 256, 1000)
BOTH = [torch.float32, torch.bfloat16]


# -- histogram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [0, 1, 700, 1500])
@pytest.mark.parametrize("experts", EXPERTS)
def test_histogram(entries: int, experts: int) -> None:
    ids = skewed_ids(entries, experts)
    counts = [torch.full((experts,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    plain.histogram(ids, counts[0])
    triton_ops.histogram(ids, counts[1])
    assert counts[0].tolist() == counts[1].tolist()
    assert int(counts[0].sum()) - 3 * experts == int(((ids >= 0) & (ids < experts)).sum())


def test_histogram_writes_nothing_beyond_the_counts() -> None:
    memory = torch.zeros(131, dtype=torch.int32, device=DEVICE)
    triton_ops.histogram(skewed_ids(900, 129), memory[1:130])
    assert memory[0] == memory[130] == 0


# -- route -----------------------------------------------------------------------------------------------------------


def _tables(experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    owner = torch.cat((torch.arange(experts), torch.randint(0, experts, (slots - experts,)))).sort().values
    count = torch.bincount(owner, minlength=experts).int()
    start = (count.cumsum(0) - count).int()
    return count.to(DEVICE), start.to(DEVICE), torch.randperm(slots).int().to(DEVICE)


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("entries", [0, 5, 600, 1600])
@pytest.mark.parametrize("experts", EXPERTS)
def test_route(entries: int, experts: int, extra: int) -> None:
    torch.manual_seed(experts)
    tables = _tables(experts, experts + extra)
    ids = skewed_ids(entries, experts)
    wanted = plain.route(ids, *tables, offset=3, invalid=experts + 7)
    assert triton_ops.route(ids, *tables, offset=3, invalid=experts + 7).tolist() == wanted.tolist()


@pytest.mark.parametrize("entries", [5, 600, 1600])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("hot", [False, True])
def test_route_counts_beside(entries: int, experts: int, hot: bool) -> None:
    tables = _tables(experts, experts + 7)
    ids = skewed_ids(entries, experts)
    if hot:
        ids = torch.where(ids % 3 > 0, experts - 1, ids)
    counts = [torch.full((experts + 2,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    routed = [
        ops.route(ids, *tables, offset=3, invalid=experts + 7, counts=found[1:-1]).tolist()
        for ops, found in zip((plain, triton_ops), counts, strict=True)
    ]
    assert routed[0] == routed[1] == plain.route(ids, *tables, offset=3, invalid=experts + 7).tolist()
    assert counts[0].tolist() == counts[1].tolist()
    assert counts[1][0] == counts[1][-1] == 3, "nothing is written beyond the counts"
    assert int((counts[1] - 3).sum()) == int(((ids >= 0) & (ids < experts)).sum())


def test_numbers_that_do_not_fit_32_bits_are_no_experts() -> None:
    ids = torch.tensor([[2**32 + 1, 1], [1, -(2**32) + 1]], device=DEVICE)
    tables = _tables(4, 11)
    wanted = plain.route(ids, *tables, offset=0, invalid=99)
    assert triton_ops.route(ids, *tables, offset=0, invalid=99).tolist() == wanted.tolist()
    counts = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    triton_ops.histogram(ids, counts)
    assert counts.tolist() == [0, 2, 0, 0]
    assert triton_ops.permute(ids, 4)[0].tolist() == [[-1, 0], [1, -1]]


# -- top-k -----------------------------------------------------------------------------------------------------------

METHODS: tuple[plain.Choice, ...] = ("default", "renormalize_naive", "renormalize", "sigmoid")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 4, 2), (1, 1, 1), (9, 8, 2), (19, 129, 8), (5, 1000, 10), (33, 60, 6), (3, 5, 5)]
)
def test_top_k(tokens: int, experts: int, k: int, dtype: torch.dtype, method: plain.Choice) -> None:
    # Every token has all of E values, half a unit or more apart, so that rounding cannot change the choice.
    order = randn(tokens, experts).argsort(dim=1)
    logits = (order.float() * 0.5 - 3).clamp(-30, 600).to(dtype) * (0.125 if experts > 100 else 1)
    wanted_ids, wanted = plain.top_k(logits, k, method)
    ids, scales = triton_ops.top_k(logits, k, method)
    assert (ids.dtype, scales.dtype) == (torch.int32, torch.float32)
    torch.testing.assert_close(scales, wanted, rtol=2e-6, atol=1e-8)
    # bfloat16 makes neighbours equal; both then take the lower id.
    assert ids.tolist() == wanted_ids.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_top_k_takes_the_lower_id_of_equal_logits(method: plain.Choice) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 2.0, -0.0, 2.0, 1.0], [-0.0, 0.0, -1, -1, 0.0]])
    for twin in (plain, triton_ops):
        assert twin.top_k(logits.to(DEVICE), 3, method)[0].tolist() == [[0, 1, 2], [1, 3, 4], [0, 1, 4]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("method", METHODS)
def test_top_k_of_infinite_and_undefined_logits_still_chooses_different_experts(method: plain.Choice) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, -inf, -inf, -inf], [-inf, 1.0, -inf, -inf], [nan, 1.0, nan, nan], [nan] * 4])
    for twin in (plain, triton_ops):
        ids, _ = twin.top_k(logits.to(DEVICE), 3, method)
        assert all(len(set(chosen)) == 3 and set(chosen) <= {0, 1, 2, 3} for chosen in ids.tolist())
        assert ids[1].tolist() == [1, 0, 2]


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (37, 768), (3, 1100), (9, 512)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = randn(rows, 2 * width, dtype=dtype)
    wanted, found = plain.swiglu(x), triton_ops.swiglu(x)
    assert found.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)
    offs = torch.tensor([0, rows // 2], dtype=torch.int32, device=DEVICE)
    assert torch.equal(triton_ops.swiglu(x, offs)[: rows // 2], found[: rows // 2])


@pytest.mark.parametrize("result", BOTH)
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (40, 300), (9, 2048)])
def test_combine(rows: int, width: int, dtype: torch.dtype, result: torch.dtype) -> None:
    local = torch.randint(-1, 6, (rows, 4), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    position, offs = plain.permute(local, 6)
    # What no entry's place is may hold anything, and nothing of it may be read.
    output = torch.cat((randn(int(offs[-1]), width, dtype=dtype), randn(3, width, dtype=dtype) * float("nan")))
    scales = torch.rand(rows, 6, generator=torch.Generator().manual_seed(3)).to(DEVICE)[:, :4]
    scales[local < 0] = float("nan")
    wanted = plain.combine(output, position, scales, result)
    found = triton_ops.combine(output, position, scales, result)
    assert found.dtype is wanted.dtype is result
    tolerance = 1e-6 if result is torch.float32 else 1e-2
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)
    for row in range(min(rows, 3)):
        mine = [float(scales[row, k]) * output[position[row, k]].float() for k in range(4) if position[row, k] >= 0]
        total = torch.stack(mine).sum(0) if mine else torch.zeros(width, device=DEVICE)
        assert torch.allclose(found[row].float(), total, rtol=tolerance, atol=max(tolerance, 1e-4))


@pytest.mark.parametrize(
    ("ranks", "rows", "tokens", "width"), [(1, 1, 1, 1), (2, 5, 3, 300), (3, 4, 0, 8), (4, 2, 2, 2048)]
)
def test_add_blocks(ranks: int, rows: int, tokens: int, width: int) -> None:
    blocks = randn(ranks, rows, width, dtype=torch.bfloat16)
    for dtype in BOTH:
        wanted, found = plain.add_blocks(blocks, tokens, dtype), triton_ops.add_blocks(blocks, tokens, dtype)
        assert found.dtype is dtype
        # The interpreter cuts off where a GPU rounds.
        exact = dtype is torch.float32 or DEVICE == "cuda"
        torch.testing.assert_close(found, wanted, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)
        if dtype is torch.float32:
            torch.testing.assert_close(found, blocks[:, :tokens].float().sum(0))


@pytest.mark.parametrize(
    ("tokens", "rows", "widths"), [(0, 3, (4, 1)), (5, 5, (1100, 8, 8, 3)), (2, 7, (3,)), (0, 0, (2,))]
)
def test_pack_rows(tokens: int, rows: int, widths: tuple[int, ...]) -> None:
    columns = [torch.full((tokens, width), 7 + i, dtype=torch.int32, device=DEVICE) for i, width in enumerate(widths)]
    for column in columns:
        column += torch.arange(tokens, dtype=torch.int32, device=DEVICE).unsqueeze(1) * 100
    wanted, found = (torch.zeros(rows, sum(widths) + 6, dtype=torch.int32, device=DEVICE) for _ in range(2))
    plain.pack_rows(columns, wanted)
    triton_ops.pack_rows(columns, found)
    assert torch.equal(found, wanted)
    assert (found[tokens:] == -1).all()
    assert (found[:, sum(widths) :] == -1).all()


@pytest.mark.parametrize("pack", [plain.pack_rows, triton_ops.pack_rows])
@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((3, 9),)])
def test_columns_that_do_not_fit_are_refused(pack: Any, shapes: tuple[tuple[int, int], ...]) -> None:
    columns = [torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match="do not fit rows"):
        pack(columns, torch.zeros(3, 8, dtype=torch.int32, device=DEVICE))
