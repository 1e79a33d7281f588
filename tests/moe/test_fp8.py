"""Experts in fp8: what slots hold, what they compute against a slow twin, and what must not be hidden or invented."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.checks.equality import TOLERANCE, compare, reference_output
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.moe import MoeShape, RenormalizeMoeRoutingMethod, create_moe
from moe_eplb.moe.experts import ExpertSlots
from moe_eplb.moe.fp8 import in_expert_dtype, require_fp8, scaled_product
from moe_eplb.moe.grouping import Grouped, sum_over_k

FP8 = torch.float8_e4m3fn
NAMES = ("w3_w1", "w2", "w3_w1_scale", "w2_scale")
HIDDEN, INTERMEDIATE, SLOTS, TOP_K = 64, 48, 5, 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _able() -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this GPU has no scaled grouped GEMM")


def _expert(expert: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(expert)
    w3_w1 = torch.randn(2 * INTERMEDIATE, HIDDEN, generator=generator) * HIDDEN**-0.5
    # Rows of very different size: a product that takes another row's scale is far off.
    w3_w1 *= torch.exp(torch.randn(2 * INTERMEDIATE, 1, generator=generator))
    w2 = torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * INTERMEDIATE**-0.5
    return in_expert_dtype({"w3_w1": w3_w1, "w2": w2}, FP8)


def _experts(spare: int = 0) -> ExpertSlots:
    experts = ExpertSlots(SLOTS, HIDDEN, INTERMEDIATE, FP8, DEVICE, spare=spare)
    for slot in range(SLOTS):
        experts.load(slot, _expert(slot))
    return experts


def _hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16().to(DEVICE)


def _slots(tokens: int, least: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(least, SLOTS, (tokens, TOP_K), generator=generator).int().to(DEVICE)


def _output(
    experts: ExpertSlots, hidden: torch.Tensor, slots: torch.Tensor, entries: int | None = None
) -> torch.Tensor:
    grouped = experts.group(hidden, slots, entries)
    scales = torch.full(slots.shape, 1.0, device=DEVICE)
    return sum_over_k(experts.grouped_ffn(grouped), grouped.position, scales, torch.bfloat16)


# -- what slots hold --------------------------------------------------------------------------------------------------


def test_a_slot_has_four_tensors_in_the_storage_that_is_multiplied() -> None:
    experts = _experts(spare=1)
    slot = experts.by_slot()[3]
    assert tuple(slot) == NAMES == experts.names
    assert [(t.dtype, tuple(t.shape)) for t in slot.values()] == [
        (FP8, (2 * INTERMEDIATE, HIDDEN)), (FP8, (HIDDEN, INTERMEDIATE)),
        (torch.float32, (2 * INTERMEDIATE,)), (torch.float32, (HIDDEN,)),
    ]  # fmt: skip
    for name, tensor in slot.items():
        assert tensor.data_ptr() == experts.weight(name)[3].data_ptr()
        assert torch.equal(tensor.float().cpu(), _expert(3)[name].float())
    assert [sorted(cell) for cell in experts.by_cell()] == [sorted(NAMES)] * (SLOTS + 1)


def test_matrices_are_quantised_row_by_row_when_they_come_without_scales() -> None:
    experts, matrix = _experts(), torch.randn(2 * INTERMEDIATE, HIDDEN, generator=torch.Generator().manual_seed(1))
    matrix[5] *= 1000
    experts.load(0, {"w3_w1": matrix, "w2": torch.zeros(HIDDEN, INTERMEDIATE)})
    held = experts.slot_tensor(0, "w3_w1").float().cpu() * experts.slot_tensor(0, "w3_w1_scale").cpu().unsqueeze(1)
    assert bool(((held - matrix).abs() <= matrix.abs() * 0.0626 + matrix.abs().amax(1, keepdim=True) * 2.2e-6).all())
    assert torch.isfinite(experts.slot_tensor(0, "w2_scale")).all()
    assert not experts.slot_tensor(0, "w2").float().any()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: weights.pop("w2_scale"),
        lambda weights: weights.update(w2_scale=weights["w2_scale"][1:]),
        lambda weights: weights.update(w2_scale=weights["w2_scale"].double()),
        lambda weights: weights.update(w2=weights["w2"].float()),
        lambda weights: weights.pop("w3_w1"),
    ],
)
def test_an_expert_with_a_part_missing_or_of_another_kind_is_refused(spoil: object) -> None:
    weights = _expert(0)
    spoil(weights)  # type: ignore[operator]
    with pytest.raises(BalancerError, match="E153"):
        _experts().load(0, weights)


@pytest.mark.parametrize(("hidden", "intermediate"), [(24, 32), (32, 8)])
def test_sizes_that_are_no_multiples_of_16_are_refused(hidden: int, intermediate: int) -> None:
    with pytest.raises(BalancerError, match="E152"):
        ExpertSlots(1, hidden, intermediate, FP8)


@pytest.mark.parametrize(
    ("states", "experts"),
    [(torch.float32, FP8), (FP8, None), (FP8, FP8), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_dtypes_that_cannot_be_multiplied_are_refused(states: torch.dtype, experts: torch.dtype | None) -> None:
    with pytest.raises(BalancerError, match="E187"):
        MoeShape(4, 2, 16, 16, states, experts)
    assert MoeShape(4, 2, 16, 16, torch.bfloat16, FP8).weight_dtype is FP8
    assert MoeShape(4, 2, 16, 16, torch.float32).weight_dtype is torch.float32


def test_a_gpu_without_scaled_grouped_gemm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(BalancerError, match=r"E188(.|\n)*8\.0"):
        require_fp8(torch.device("cuda"))
    require_fp8(torch.device("cpu"))


# -- what they compute ------------------------------------------------------------------------------------------------


def _quantised(row: torch.Tensor) -> torch.Tensor:
    """A row as one scale times values of fp8, float64; written once more, element by element."""
    scale = max(float(value.abs()) for value in row) / 448
    return torch.tensor([float(torch.tensor(float(v) / scale).to(FP8)) * scale for v in row], dtype=torch.float64)


def _twin(hidden: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """One entry in float64, with both roundings of activations that the fast path has."""
    row = _quantised(hidden.double())
    up = torch.stack(
        [(w.double() * s.double()) @ row for w, s in zip(weights["w3_w1"], weights["w3_w1_scale"], strict=True)]
    )
    up, gate = up.bfloat16().double().chunk(2)
    activated = _quantised(gate * torch.sigmoid(gate) * up)
    return torch.stack(
        [(w.double() * s.double()) @ activated for w, s in zip(weights["w2"], weights["w2_scale"], strict=True)]
    )


def test_entries_equal_a_twin_that_rounds_activations_alike() -> None:
    experts, hidden, slots = _experts(), _hidden(9), _slots(9)
    found = _output(experts, hidden, slots).double().cpu()
    wanted = torch.stack(
        [
            sum(_twin(row, _expert(slot)) for slot in line)
            for row, line in zip(hidden.cpu(), slots.tolist(), strict=True)
        ]
    )
    # bfloat16's rounding; where a sum in another order rounds gate or up otherwise, a step of fp8 in one of 48 parts.
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_outputs_are_within_the_tolerance_and_a_wrong_expert_is_far_outside(tokens: int) -> None:
    experts, hidden, slots = _experts(), _hidden(tokens), _slots(tokens)
    ones = torch.ones(tokens, TOP_K)
    wanted = reference_output(hidden.cpu(), slots.cpu(), ones, _expert)
    assert compare(_output(experts, hidden, slots).cpu(), wanted).ratio <= TOLERANCE[FP8]
    wrong = torch.where(slots == slots[0, 0], (slots + 1) % SLOTS, slots)
    assert compare(_output(experts, hidden, wrong).cpu(), wanted).ratio > 2 * TOLERANCE[FP8]


@pytest.mark.parametrize(
    ("hidden", "intermediate", "tokens", "top_k"),
    [(16, 16, 1, 1), (16, 16, 8, 2), (64, 48, 48, 4), (256, 128, 64, 8), (1024, 512, 16, 8)],
)
def test_random_layers_of_any_size_are_within_the_tolerance(
    hidden: int, intermediate: int, tokens: int, top_k: int
) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        drawn = [
            {"w3_w1": torch.randn(2 * intermediate, hidden), "w2": torch.randn(hidden, intermediate)} for _ in range(8)
        ]
        masters = [in_expert_dtype({n: w * w.shape[1] ** -0.5 for n, w in one.items()}, FP8) for one in drawn]
        experts = ExpertSlots(8, hidden, intermediate, FP8, DEVICE)
        for slot, weights in enumerate(masters):
            experts.load(slot, weights)
        x, scales = torch.randn(tokens, hidden).bfloat16(), torch.softmax(torch.randn(tokens, top_k), dim=1)
        ids = torch.rand(tokens, 8).argsort(dim=1)[:, :top_k].int()
        grouped = experts.group(x.to(DEVICE), ids.to(DEVICE))
        output = experts.grouped_ffn(grouped)
        y = sum_over_k(output, grouped.position, scales.to(DEVICE), torch.bfloat16).cpu()
        assert compare(y, reference_output(x, ids, scales, masters.__getitem__)).ratio <= TOLERANCE[FP8]


@pytest.mark.parametrize("shift", [0, 1])
def test_the_scales_of_another_expert_change_the_output(shift: int) -> None:
    experts, hidden, slots = _experts(), _hidden(40), _slots(40)
    experts.weight("w3_w1_scale").copy_(experts.weight("w3_w1_scale").roll(shift, dims=0).clone())
    wanted = reference_output(hidden.cpu(), slots.cpu(), torch.ones(40, TOP_K), _expert)
    ratio = compare(_output(experts, hidden, slots).cpu(), wanted).ratio
    assert (ratio > 2 * TOLERANCE[FP8]) is (shift == 1)


def test_slots_compute_with_the_scales_of_their_cells() -> None:
    experts = _experts(spare=2)
    moved = [6, 1, 0, 3, 5]
    for name in NAMES:
        old = experts.weight(name).clone()
        for slot, cell in enumerate(moved):
            experts.weight(name)[cell] = old[slot]
    experts.slot_cells.copy_(torch.tensor(moved))
    hidden, slots = _hidden(20), _slots(20)
    torch.testing.assert_close(
        _output(experts, hidden, slots), _output(_experts(), hidden, slots), rtol=0.02, atol=0.02
    )


# -- what must not be hidden or invented ------------------------------------------------------------------------------


def test_rows_after_the_last_end_change_nothing() -> None:
    experts, hidden, slots = _experts(), _hidden(30), _slots(30, least=-1)
    entries = int((slots >= 0).sum())
    outputs = []
    for given in (entries, None):
        grouped = experts.group(hidden, slots, given)
        assert grouped.row_scale is not None
        grouped.rows[entries:].view(torch.uint8).fill_(0x7F)  # NaN
        grouped.row_scale[entries:] = float("nan")
        output = experts.grouped_ffn(grouped)
        output[entries:] = float("nan")
        outputs.append(sum_over_k(output, grouped.position, torch.ones(slots.shape, device=DEVICE), torch.bfloat16))
    assert torch.isfinite(outputs[0]).all()
    # A GPU's GEMM adds in an order that goes by the number of rows, and what is rounded then differs by a step.
    allowed = 0.0 if DEVICE.type == "cpu" else 0.03
    assert (outputs[0] - outputs[1]).abs().max() <= allowed * outputs[0].abs().max()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_token_that_is_not_finite_spoils_its_own_output_and_no_other(value: float) -> None:
    experts, hidden, slots = _experts(), _hidden(12), _slots(12)
    hidden[4, 7] = value
    finite = torch.isfinite(_output(experts, hidden, slots))
    assert not finite[4].any()
    assert finite[[token for token in range(12) if token != 4]].all()


def test_a_token_of_zeros_gives_zeros() -> None:
    experts, hidden, slots = _experts(), _hidden(6), _slots(6)
    hidden[2] = 0
    output = _output(experts, hidden, slots)
    assert not output[2].any()
    assert torch.isfinite(output).all()


def test_nothing_at_all_is_nothing() -> None:
    experts = _experts()
    for slots in (_slots(0), torch.full((3, TOP_K), -1, dtype=torch.int32, device=DEVICE)):
        output = _output(experts, _hidden(len(slots)), slots, 0)
        assert output.shape == (len(slots), HIDDEN)
        assert not output.any()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_the_scaled_grouped_gemm_equals_the_dequantised_product() -> None:
    experts, hidden, slots = _experts(), _hidden(300), _slots(300)
    grouped: Grouped = experts.group(hidden, slots)
    assert grouped.row_scale is not None
    given = (grouped.rows, grouped.row_scale, experts.weight("w3_w1"), experts.weight("w3_w1_scale"), grouped.offs)
    found, wanted = scaled_product(*given).cpu(), scaled_product(*(tensor.cpu() for tensor in given))
    assert found.dtype is wanted.dtype is torch.bfloat16
    assert compare(found, wanted.float()).ratio <= 0.01


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["wide_ep", "grouped"])
def test_layers_compute_in_fp8(backend: str) -> None:
    layer = create_moe(
        RenormalizeMoeRoutingMethod(TOP_K), num_experts=SLOTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        dtype=torch.bfloat16, expert_dtype=FP8, device=get_device(DEVICE.type, NullSink()), backend=backend,
    )  # fmt: skip
    layer.load_weights(_expert)
    x, logits = _hidden(33), torch.randn(33, SLOTS, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids, scales = layer.routing_method.apply(logits)
    y = layer(x, logits)
    assert y.dtype is torch.bfloat16
    assert compare(y.cpu(), reference_output(x.cpu(), ids.cpu(), scales.cpu(), _expert)).ratio <= TOLERANCE[FP8]


def test_the_batched_backend_has_no_scales() -> None:
    with pytest.raises(BalancerError, match=r"E158(.|\n)*scales"):
        create_moe(
            RenormalizeMoeRoutingMethod(TOP_K), num_experts=SLOTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
            dtype=torch.bfloat16, expert_dtype=FP8, device=get_device("cpu", NullSink()), backend="fused",
        )  # fmt: skip
