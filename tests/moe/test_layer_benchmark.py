"""The GPU benchmark of the layer: its composition computes what the layer does, and its figures are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import few_rows, grouped_products, moe_layer
from benchmarks.gpu.gain import WORKLOADS
from benchmarks.gpu.layer_cases import CASES, Case, gemms_alone, group, make_inputs, make_layer, obvious
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device

HOT = WORKLOADS["hot"]
SMALL = Case("small", 40, 6, 16, 8, 2, 1.5, 0.5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_composition_computes_what_the_layer_computes(dtype: torch.dtype, tolerance: float) -> None:
    layer = make_layer(SMALL, get_device("cpu", NullSink()), dtype)
    inputs = make_inputs(SMALL, 0, torch.device("cpu"), dtype)
    weights = (layer.experts.weight("w3_w1"), layer.experts.weight("w2"))
    wanted, got = obvious(inputs, SMALL.top_k, *weights).float(), layer(*inputs, [SMALL.tokens]).float()
    assert float((got - wanted).norm() / wanted.norm()) <= tolerance
    assert wanted.norm() > 1
    up_gate, down = gemms_alone(group(inputs, SMALL.top_k, *weights), *weights)
    assert (up_gate.shape, down.shape) == ((80, 16), (80, 16))


def test_a_case_reaches_what_is_asked_of_it_or_not() -> None:
    figures = moe_layer.summary(SMALL, {"obvious": [4.0, 3.0, 9.0], "layer": [2.0, 2.0, 1.0], "gemms": [1.0, 1.5, 1.0]})
    assert figures["median_ms"] == {"obvious": 4.0, "layer": 2.0, "gemms": 1.0}
    assert (figures["speedup"], figures["gemm_share"], figures["reached"]) == (2.0, 0.5, True)
    assert figures["tflops"]["layer"] == pytest.approx(6 * 80 * 16 * 8 / 2e-3 / 1e12)
    slow = moe_layer.summary(SMALL, {"obvious": [4.0], "layer": [2.1], "gemms": [1.0]})
    assert not slow["reached"]
    nothing_asked = moe_layer.summary(CASES[1], {"obvious": [1.0], "layer": [9.0], "gemms": [1.0]})
    assert nothing_asked["reached"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [few_rows, grouped_products, moe_layer])
def test_without_a_gpu_it_says_so(module: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(module.main, ["--out", str(tmp_path / "found.json")])
    assert done.exit_code == 2
    assert "no GPU" in done.output
    assert not (tmp_path / "found.json").exists()


def test_rows_that_are_balanced_fill_tiles_better_with_uniform_routing_than_with_few_hot_experts() -> None:
    """Why few hot experts cost more than uniform routing however even the ranks are."""
    uniform, hot = (grouped_products.balanced_rows(workload) for workload in ({"kind": "uniform"}, HOT))
    assert len(uniform) == len(hot) == 35
    assert abs(int(uniform.sum()) - int(hot.sum())) < 0.02 * uniform.sum()
    assert hot.max() > 3 * uniform.max()
    assert 1.10 < grouped_products.padded(uniform) < 1.16 < grouped_products.padded(hot) < 1.22
    assert grouped_products.padded(np.array([256, 1, 257]), 256) == pytest.approx((256 + 256 + 512) / 514)


def test_few_rows_are_drawn_evenly_or_not() -> None:
    even, uneven = (
        few_rows.rows_of(128, 1024, even=given, generator=torch.Generator().manual_seed(1)) for given in (True, False)
    )
    assert int(even.sum()) == int(uneven.sum()) == 1024
    assert int(even.max()) < 20 < 60 < int(uneven.max())


def test_products_of_few_rows_are_summed_and_the_fastest_found() -> None:
    samples = {"1 torch": [0.2, 0.3, 0.1], "2 torch": [0.1], "1 a": [0.09], "1 b": [0.08], "2 a": [0.03], "2 b": [0.05]}
    found = few_rows.summary(samples, ["a", "b"], 560_000_000)
    assert [found[name] for name in ("torch_us", "ours_us", "best_us")] == pytest.approx([300, 140, 110])
    assert found["ratio"] == pytest.approx(140 / 300)
    assert found["ours_tb_per_s"] == pytest.approx(4.0)
    assert found["torch_tb_per_s"] == pytest.approx(560 / 300)
