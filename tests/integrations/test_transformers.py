"""Whole transformers models say the same with our MoE layers as with their own, while experts move."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.events import NullSink
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import get_device
from moe_eplb.integrations.transformers import ModuleWeights, iterations, load_model, replace_moe_blocks
from tests.support.ranks import run_ranks
from tests.support.tiny_models import save

ROOT = Path(__file__).parents[2]
MODELS = {name: ROOT / "scenarios" / "data" / f"tiny_{name}" for name in
          ("deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe")}  # fmt: skip
TOKENS, SLOTS = 64, 12


class Moves(NullProbe):
    """Counts commits that changed a slot."""

    def __init__(self) -> None:
        self.commits = 0

    def committed(self, layer: int, taken: int, placement: Any, changed: Any, moved_bytes: int) -> None:
        self.commits += len(changed) > 0


class Said(NamedTuple):
    """Token ids of every sequence, by the model's own blocks, ours without and ours with a balancer; and commits."""

    theirs: list[list[int]]
    off: list[list[int]]
    on: list[list[int]]
    commits: int


def _prompt(rank: int, size: int) -> torch.Tensor:
    """Two sequences, of other tokens on each rank."""
    return torch.randint(0, 128, (2, 6), generator=torch.Generator().manual_seed(100 * size + rank))


def _generate(model: Any, prompt: torch.Tensor) -> list[list[int]]:
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=TOKENS,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    said: list[list[int]] = output[:, prompt.shape[1] :].tolist()
    return said


@torch.inference_mode()
def _talk(rank: int, size: int, name: str, groups: list[Any], limit: int | None, dispatch: str) -> Said:
    prompt, said, moves = _prompt(rank, size), [], Moves()
    for updates in (None, 3):
        model = load_model(MODELS[name], seed=1, dtype=torch.float32)
        said += [_generate(model, prompt)] if updates is None else []
        device = get_device("cpu", NullSink(), seed=5, rank=rank)
        options = {"num_slots": SLOTS, "ep_group": groups[1], "statistics_group": groups[2], "dispatch": dispatch,
                   "moe_max_num_tokens": limit}  # fmt: skip
        if updates is None:
            replace_moe_blocks(model, device, **options)
            said.append(_generate(model, prompt))
            continue
        balancer = MoeLoadBalancer(
            rank, size, updates, device=device, group=groups[0], probe=moves,
            options=BalancerOptions(empty_group="never"),
        )  # fmt: skip
        with balancer:
            replace_moe_blocks(model, device, **options)
        balancer.finalize_model()
        balancer.set_iter_info(enable_statistic=True, enable_update_weights=True)
        try:
            with iterations(model, balancer):
                said.append(_generate(model, prompt))
        finally:
            balancer.shutdown()
    return Said(*said, moves.commits)


def _talk_all(rank: int, size: int) -> dict[str, Said]:
    groups = [dist.new_group(list(range(size))) if size > 1 else None for _ in range(3)]
    ways = {"deepseek_v3": (None, "allgather"), "mixtral": (3, "alltoall"), "qwen2_moe": (5, "allgather"),
            "qwen3_moe": (None, "alltoall")}  # fmt: skip
    return {name: _talk(rank, size, name, groups, *ways[name]) for name in MODELS}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_generation_is_the_same_token_for_token(size: int) -> None:
    by_rank = [_talk_all(0, 1)] if size == 1 else run_ranks(_talk_all, size, timeout=200)
    for rank, models in enumerate(by_rank):
        for name, said in models.items():
            assert [len(sequence) for sequence in said.theirs] == [TOKENS, TOKENS]
            assert len({token for sequence in said.theirs for token in sequence}) > 10, "the text varies"
            assert said.off == said.theirs, (name, rank, "balancer off")
            assert said.on == said.theirs, (name, rank, "balancer on")
            assert said.commits >= 50, (name, rank, said.commits)


def test_weights_are_the_modules_own() -> None:
    for name, folder in MODELS.items():
        model = load_model(folder, seed=1, dtype=torch.float32)
        layer = 2
        block = model.model.layers[layer].mlp
        replaced = {one.layer: one for one in replace_moe_blocks(model, get_device("cpu", NullSink()))}[layer]
        x = torch.randn(3, 32)
        gate, up = torch.nn.functional.linear(x, block.experts.gate_up_proj[5]).chunk(2, dim=-1)
        w3, w1 = replaced.weights(5)["w3_w1"].chunk(2)
        assert torch.equal(x @ w1.T, gate), name
        assert torch.equal(x @ w3.T, up), name
        assert (replaced.shared is not None) == (name in ("deepseek_v3", "qwen2_moe"))
        assert ModuleWeights  # the source that the blocks were filled from


def test_a_model_of_another_family_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **tiny))
    with pytest.raises(ScenarioError, match=r"E044(.|\n)*llama"):
        replace_moe_blocks(model, get_device("cpu", NullSink()))


def test_a_checkpoint_with_weights_is_loaded_from_them(tmp_path: Path) -> None:
    drawn = load_model(MODELS["mixtral"], seed=3, dtype=torch.float32)
    drawn.save_pretrained(tmp_path, max_shard_size="40KB")
    read = load_model(tmp_path, seed=4, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), read.parameters(), strict=True))
    next(tmp_path.glob("model-00001*")).write_bytes(b"junk")
    with pytest.raises(ScenarioError, match="E046"):
        load_model(tmp_path, seed=4, dtype=torch.float32)


def test_the_example_runs_as_documented() -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "docs/examples/generate.py", "scenarios/data/tiny_mixtral",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop(
        "PYTHONUNBUFFERED", None
    )  # else a line and its end are two writes, between which the other rank's go
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^rank (\d): \[([\d, ]+)\], (\d+) slots changed$", done.stdout, re.MULTILINE)
    assert sorted(rank for rank, _, _ in lines) == ["0", "1"]
    assert all(len(tokens.split(",")) == 24 and int(slots) > 0 for _, tokens, slots in lines)


def _load(rank: int, size: int, folder: Path) -> tuple[list[str], bool]:
    """Threads that loading a model leaves, and whether progress bars are shown afterwards as before."""
    from transformers.utils import logging

    before, shown = set(threading.enumerate()), logging.is_progress_bar_enabled()
    load_model(folder, seed=0, dtype=torch.float32)
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    return left, logging.is_progress_bar_enabled() == shown


def test_loading_weights_leaves_no_thread(tmp_path: Path) -> None:
    save("qwen2_moe", tmp_path)
    assert run_ranks(_load, 1, tmp_path) == [([], True)]
