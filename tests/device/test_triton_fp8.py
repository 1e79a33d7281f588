"""Rows are quantised as said, and the Triton kernels that do so where they write them equal their plain twins."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from moe_eplb.device.ops import plain
from tests.support.kernel_inputs import randn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
elif torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this GPU has no fp8", allow_module_level=True)
from moe_eplb.device.ops import triton_fp8, triton_group, triton_ops  # noqa: E402

INF, NAN = float("inf"), float("nan")


_randn = partial(randn, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter rounds to fp8 wrongly, so there kernels store what they would round, and the test rounds it."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_fp8, "FP8", torch.float32)


def _fp8(stored: torch.Tensor) -> torch.Tensor:
    """What a kernel stored, as fp8."""
    assert stored.dtype is (torch.float32 if DEVICE == "cpu" else torch.float8_e4m3fn)
    return stored.to(torch.float8_e4m3fn)


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.uint8)


# -- the plain twin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 16), (5, 16), (3, 7, 48)])
def test_quantised_rows_are_as_near_as_three_bits_of_mantissa(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _randn(*shape, dtype=dtype) * 37
    rows, scale = plain.quantize_rows(x)
    assert (rows.shape, scale.shape, scale.dtype) == (shape, shape[:-1], torch.float32)
    back = rows.float() * scale.unsqueeze(-1)
    # Half a step: 2^-4 of the value, and of the smallest normal value, 2^-6, where values are denormal.
    allowed = x.float().abs() * 2.0**-4 + scale.unsqueeze(-1) * 2.0**-10
    assert bool(((back - x.float()).abs() <= allowed * 1.0001).all())
    if x.numel():
        torch.testing.assert_close(back.abs().amax(-1), x.float().abs().amax(-1), rtol=1e-6, atol=0)


def test_rows_of_zeros_and_of_tiny_values_have_a_scale() -> None:
    x = torch.tensor([[0.0, -0.0], [1e-38, -3e-39], [2.0**-60, 0.0]], device=DEVICE)
    rows, scale = plain.quantize_rows(x)
    assert torch.isfinite(scale).all()
    assert (scale > 1e-30).all()
    assert rows.float().tolist() == [[0.0, 0.0], [0.0, 0.0], [448.0, 0.0]]


def test_what_is_not_finite_stays_visible_in_every_product_with_its_row() -> None:
    x = torch.tensor([[1.0, INF], [-INF, 2.0], [NAN, 1.0], [INF, NAN], [3.0, 3.0e38]], device=DEVICE)
    rows, scale = plain.quantize_rows(x)
    products = (rows.float() @ torch.tensor([[1.0], [0.0]], device=DEVICE)).squeeze(1) * scale
    assert torch.isfinite(products).tolist() == [False, False, False, False, True]


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "top_k", "width", "slots", "spare"),
    [(0, 2, 16, 4, None), (1, 1, 16, 1, 0), (37, 8, 64, 20, 2), (50, 3, 304, 33, None), (9, 8, 2048, 7, 3)],
)
def test_permute_rows_fp8(
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
    generator = torch.Generator().manual_seed(rows)
    local = (torch.randint(-1, slots + 1, (rows, top_k), generator=generator)).int().to(DEVICE)
    groups = slots + (spare or 0)
    cells = None if spare is None else torch.randperm(groups, generator=generator)[:slots].int().to(DEVICE)
    hidden = _randn(rows, width + 8, dtype=dtype)[:, :width]  # rows with a stride, as they come out of a collective
    placed = int(((local >= 0) & (local < slots)).sum())
    for entries in (None, placed):
        wanted, wanted_scale, wanted_position, wanted_offs = plain.permute_rows_fp8(
            hidden, local, groups, cells, entries
        )
        found, scale, position, offs = triton_ops.permute_rows_fp8(hidden, local, groups, cells, entries)
        assert position.tolist() == wanted_position.tolist()
        assert offs.tolist() == wanted_offs.tolist()
        assert found.shape == wanted.shape == (local.numel() if entries is None else entries, width)
        assert torch.equal(scale[:placed], wanted_scale[:placed])
        assert torch.equal(_bytes(_fp8(found[:placed])), _bytes(wanted[:placed]))


@pytest.mark.parametrize("first", [1, 7])
def test_slots_are_counted_from_the_first(first: int) -> None:
    local = torch.randint(-1, 6, (20, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    _, _, wanted, ends = plain.permute_rows_fp8(hidden, local, 5)
    for twin in (plain, triton_ops):
        _, _, position, offs = twin.permute_rows_fp8(hidden, (local + first).int(), 5, first_slot=first)
        assert position.tolist() == wanted.tolist()
        assert offs.tolist() == ends.tolist()


def test_permuted_rows_keep_the_bytes_of_their_token() -> None:
    local = torch.tensor([[1, 0], [-1, 1], [0, 0]], dtype=torch.int32, device=DEVICE)
    hidden = _randn(3, 32)
    rows, scale, position, _ = triton_ops.permute_rows_fp8(hidden, local, 2)
    once, once_scale = plain.quantize_rows(hidden)
    for token, k in (position >= 0).nonzero().tolist():
        place = int(position[token, k])
        assert scale[place] == once_scale[token]
        assert torch.equal(_bytes(_fp8(rows)[place]), _bytes(once[token]))


def test_permute_rows_fp8_writes_nothing_beyond_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer places are given than there are entries, inside memory that shows every other write."""
    memory, scales = torch.zeros(30, 16, device=DEVICE).to(triton_fp8.FP8), torch.zeros(30, device=DEVICE)
    empty, given = torch.empty, {(10, 16): memory[5:15], (10,): scales[5:15]}
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: given[size] if size in given else empty(*size, **kw))
    local = torch.zeros(20, 1, dtype=torch.int32, device=DEVICE)
    triton_ops.permute_rows_fp8(torch.ones(20, 16, device=DEVICE), local, 2, None, 10)
    assert memory.float().amax(dim=1).gt(0).tolist() == [False] * 5 + [True] * 10 + [False] * 15
    assert scales.gt(0).tolist() == [False] * 5 + [True] * 10 + [False] * 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 16), (37, 768), (3, 1104), (9, 512), (2, 5000)])
def test_swiglu_fp8(rows: int, width: int, dtype: torch.dtype) -> None:
    x = _randn(rows, 2 * width, dtype=dtype)
    (wanted, wanted_scale), (found, scale) = plain.swiglu_fp8(x), triton_ops.swiglu_fp8(x)
    assert (found.shape, scale.shape) == ((rows, width), (rows,))
    torch.testing.assert_close(scale, wanted_scale, rtol=2e-6, atol=0)
    # A sigmoid that differs in the last bit may fall on the other side of what lies between two values.
    steps = (_bytes(_fp8(found)).int() & 0x7F) - (_bytes(wanted).int() & 0x7F)
    assert int(steps.abs().sum()) <= steps.numel() * 0.002
    assert not steps.numel() or int(steps.abs().max()) <= 1
    assert bool((_fp8(found).float() * wanted.float() >= 0).all())
    offs = torch.tensor([0, rows // 2], dtype=torch.int32, device=DEVICE)
    bounded, bounded_scale = triton_ops.swiglu_fp8(x, offs)
    half = rows // 2
    assert torch.equal(_bytes(bounded[:half]), _bytes(found[:half]))
    assert torch.equal(bounded_scale[:half], scale[:half])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_kernels_give_rows_that_are_not_finite_a_scale_that_is_not_finite() -> None:
    hidden = _randn(6, 32, dtype=torch.float32)
    hidden[1, 3], hidden[2, 31], hidden[3, 0], hidden[4] = INF, NAN, -INF, 0.0
    finite = [True, False, False, False, True, True]
    local = torch.zeros(6, 1, dtype=torch.int32, device=DEVICE)
    for twin in (plain, triton_ops):
        _, scale, position, _ = twin.permute_rows_fp8(hidden, local, 1)
        assert torch.isfinite(scale[position[:, 0].long()]).tolist() == finite
        _, scale = twin.swiglu_fp8(torch.cat((torch.ones_like(hidden), hidden), dim=1))
        assert torch.isfinite(scale).tolist() == finite
        assert scale[4] > 0
