from __future__ import annotations

import pytest

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario

BASE = """\
ranks: 2
iterations: 12
model: {layers: 4, experts: 16, top_k: 2}
workload: {kind: model}
balancer: {num_slots: 20, layer_updates_per_iter: 2}
"""

# A checkpoint's sizes in full, as a loaded scenario has them: no configuration is read.
SIZES = "layers: 4, experts: 16, top_k: 2, hidden: 32, intermediate: 16, shared_intermediate: 24, hf: nowhere"
ROUTER = "routing: {method: deepseek_v3, groups: 4, top_groups: 2, scale: 2.5, normalize: false}"
WHOLE = f"""\
ranks: 2
iterations: 12
model: {{{SIZES}, {ROUTER}, part: whole}}
workload: {{kind: model, steps: generate, prompt_tokens: 4, tokens_per_rank: 2}}
"""


def load(text: str, *overrides: str) -> Scenario:
    return scenarios.loads(text, "x.yaml", overrides)


def refused(text: str, *overrides: str, code: str = "E032") -> ScenarioError:
    with pytest.raises(ScenarioError) as caught:
        load(text, *overrides)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["model.routing.method=llama4"], "routing 'llama4' chooses one expert, top_k is 2", "top_k: 1"),
        (["model.routing.normalize=false"], "'normalize' has no effect with routing 'renormalize'", "remove"),
        (["model.routing={method: llama4, normalize: false}", "model.top_k=1"], "'normalize' has no effect", "remove"),
        (["model.routing.scale=2.5"], "'scale' has no effect with routing 'renormalize'", "remove"),
        (["model.repeated_layers={4: 2}"], "there is no layer 4: layers are 0 to 3", ""),
        (["model.repeated_layers={-1: 2}"], "there is no layer -1: layers are 0 to 3", ""),
        (["model.part=blocks"], "part 'blocks' of a checkpoint, and none is given", "add 'hf: folder'"),
        (["model.part=whole"], "part 'whole' of a checkpoint, and none is given", "remove 'part'"),
        (["moe_max_num_tokens=1"], "takes 1 tokens at a time cannot take one of each of the 2 ranks", "2 or more"),
        (["moe_max_num_tokens=8", "calls=[start_iter]"], "'moe_max_num_tokens' has no effect with 'calls'", "remove"),
    ],
)
def test_models_that_cannot_be(overrides: list[str], message: str, hint: str) -> None:
    error = refused(BASE, *overrides)
    assert message in str(error)
    assert hint in str(error)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.routing.method=llama4", "model.top_k=1"],
        ["model.routing={method: deepseek_v3, normalize: false}"],
        ["model.repeated_layers={0: 2, 3: 16}"],
        ["moe_max_num_tokens=2"],
        ["model.shared_intermediate=13"],
    ],
)
def test_models_that_can_be(overrides: list[str]) -> None:
    assert load(BASE, *overrides).model.layers == 4


@pytest.mark.parametrize(
    ("dtype", "key", "size", "message", "hint"),
    [
        ("float32", "hidden", 2, "8 bytes of float32 are no multiple of 16", "hidden: 4 is the nearest"),
        ("float32", "hidden", 67, "268 bytes of float32", "hidden: 68 is the nearest"),
        ("float32", "intermediate", 33, "132 bytes of float32", "intermediate: 32 is the nearest"),
        ("bfloat16", "hidden", 68, "136 bytes of bfloat16", "hidden: 64 is the nearest"),
        ("bfloat16", "intermediate", 31, "62 bytes of bfloat16", "intermediate: 32 is the nearest"),
        ("float8_e4m3fn", "hidden", 72, "72 bytes of float8_e4m3fn", "hidden: 64 is the nearest"),
        ("float8_e4m3fn", "intermediate", 8, "8 bytes of float8_e4m3fn", "intermediate: 16 is the nearest"),
    ],
)
def test_rows_that_grouped_gemm_cannot_take(dtype: str, key: str, size: int, message: str, hint: str) -> None:
    overrides = [f"model.dtype={dtype}", f"model.{key}={size}"]
    error = refused(BASE, *overrides, code="E152")
    assert f"{key} {size} does not fit grouped GEMM" in error.what
    assert message in error.what
    assert hint in error.hint
    nearest = int(error.hint.split()[1])
    assert getattr(load(BASE, f"model.dtype={dtype}", f"model.{key}={nearest}").model, key) == nearest
    assert load(BASE, *overrides, "calls=[start_iter]").calls is not None


def test_a_batched_product_takes_no_scales() -> None:
    local = ("balancer=null", "model.dtype=float8_e4m3fn")
    assert load(BASE, *local, "model.backend=grouped").model.backend == "grouped"
    error = refused(BASE, *local, "model.backend=fused", code="E158")
    assert "takes no scales" in error.what


def test_a_checkpoint_s_sizes_cannot_be_chosen() -> None:
    error = refused(WHOLE.replace("hidden: 32", "hidden: 30"), code="E152")
    assert error.hint == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workload.kind=uniform"], "a whole model chooses its experts itself, the workload's kind is 'uniform'"),
        (["workload.steps=prefill"], "a whole model generates, the workload's steps are 'prefill'"),
        (["workload.tokens_per_rank=0"], "a rank without sequences has nothing to generate"),
        (["workload.tokens_per_rank=[3, 0]"], "a rank without sequences has nothing to generate"),
        (["model.backend=grouped"], "backend 'grouped' cannot stand in a whole model"),
        (["model.dtype=float8_e4m3fn"], "a whole model is loaded in one dtype, and none computes in fp8"),
        (["model.repeated_layers={1: 2}"], "'repeated_layers' has no effect with a whole model"),
        (["model.part=null"], "which part of the checkpoint?"),
        (["workload.ragged=0.5"], "'ragged' has no effect with steps 'generate'"),
    ],
)
def test_whole_models_that_cannot_be(overrides: list[str], message: str) -> None:
    assert message in str(refused(WHOLE, *overrides))


def test_a_whole_model_has_what_its_checkpoint_says() -> None:
    model = load(WHOLE).model
    assert (model.shared_intermediate, model.routing.groups, model.part) == (24, 4, "whole")


@pytest.mark.parametrize("kind", ["model", "uniform", "zipf", "balanced", "rotating"])
def test_blocks_of_a_checkpoint_take_ids_of_any_kind(kind: str) -> None:
    workload = f"workload: {{kind: {kind}}}"
    text = "\n".join(line if not line.startswith("workload") else workload for line in WHOLE.splitlines())
    assert load(text, "model.part=blocks", "model.repeated_layers={1: 2}").workload.kind == kind
