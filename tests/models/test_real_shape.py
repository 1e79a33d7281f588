"""A checkpoint layer of a real model's shape, read by four ranks: each reads its part only and needs no more memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer
from moe_eplb.balancer.host_memory import SHM_DIR
from moe_eplb.core import architecture
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.events import NullSink
from moe_eplb.device import get_device
from moe_eplb.models import CheckpointWeights, MoeBlock, SeededWeights, build_blocks
from tests.support.ranks import run_ranks

RANKS, SLOTS_PER_RANK = 4, 36
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2
ROUTER_BYTES = EXPERTS * HIDDEN * 2
MIB = 1 << 20


class Loaded(NamedTuple):
    """What a rank needed for its layer: bytes by tensor name, and growth of its resident memory."""

    read: dict[str, int]
    slots: list[int]
    peak: int
    grown: dict[str, int]
    wrong: list[str]


def _resident() -> dict[str, int]:
    """Bytes of this process by kind, and the peak of their sum."""
    fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:", "RssShmem:")
    return {field[0][:-1]: int(field[1]) * 1024 for field in fields if field[0] in wanted}


def _load(rank: int, size: int, folder: Path) -> Loaded:
    device = get_device("cpu", NullSink(), rank=rank)
    found = architecture.read(folder)
    group = dist.new_group(list(range(size)))
    _touch_libraries(found)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident()
    weights = CheckpointWeights(folder, found)
    balancer = MoeLoadBalancer(rank, size, 1, device=device, group=group, options=BalancerOptions(commit_delay=2))
    try:
        with balancer:
            blocks = build_blocks(found, weights, device, num_slots=SLOTS_PER_RANK * size, ep_group=group)
        balancer.finalize_model()
        after = _resident()
        layer = balancer.layers[0]
        wrong = _wrong_slots(folder, blocks[0], layer.local_slot_experts()) + _wrong_copies(folder, balancer)
        grown = {kind: after[kind] - before[kind] for kind in ("RssAnon", "RssFile", "RssShmem")}
        peak = after["VmHWM"] - before["VmRSS"]
        return Loaded(dict(weights.bytes_read), layer.local_slot_experts(), peak, grown, wrong)
    finally:
        balancer.shutdown()


def _touch_libraries(found: Architecture) -> None:
    """Code that is read in when it first runs is no memory of the layer."""
    small = Architecture(found.family, "", 1, (0,), 4, 2, 16, 8, 0, "float32", found.routing)
    build_blocks(small, SeededWeights(small, 0, torch.float32), get_device("cpu", NullSink()))


def _stored(folder: Path, expert: int) -> dict[str, torch.Tensor]:
    """An expert as the file has it, read without the code under test."""
    parts = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in ("up_proj", "gate_proj", "down_proj"):
                key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
                if key in shard.keys():  # noqa: SIM118
                    parts[name] = shard.get_tensor(key)
    return {"w3_w1": torch.cat((parts["up_proj"], parts["gate_proj"])), "w2": parts["down_proj"]}


def _wrong_slots(folder: Path, block: MoeBlock, experts: list[int]) -> list[str]:
    held = block.moe.experts.by_slot()
    return [
        f"slot {slot}: {name} of expert {expert}"
        for slot, expert in list(enumerate(experts))[::7]
        for name, stored in _stored(folder, expert).items()
        if not torch.equal(held[slot][name], stored)
    ]


def _wrong_copies(folder: Path, balancer: MoeLoadBalancer) -> list[str]:
    """Host copies of experts of all ranks."""
    host = balancer.layers[0].updates.host
    return [
        f"host copy: {name} of expert {expert}"
        for expert in range(balancer.ep_rank, EXPERTS, 31)
        for name, stored in _stored(folder, expert).items()
        if not torch.equal(host.host_tensor(expert, name), stored)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of Qwen3-30B-A3B's shape, in bfloat16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("real_shape")
    total = EXPERTS * EXPERT_BYTES
    for place, free in ((folder, shutil.disk_usage(folder).free), (SHM_DIR, shutil.disk_usage(SHM_DIR).free)):
        assert free > 1.1 * total, f"{place} has {free / MIB:.0f} MiB free, this test needs {1.1 * total / MIB:.0f} MiB"
    config = Qwen3MoeConfig(
        vocab_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, norm_topk_prob=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        # Bits below 0x4000 are numbers up to 2: no NaN, which would differ from itself.
        weight.data.view(torch.int16).random_(0x4000, generator=generator)
    model.save_pretrained(folder, max_shard_size="400MB")
    return folder


@pytest.mark.timeout(110)
def test_each_rank_reads_its_part_and_holds_nothing_twice(checkpoint: Path) -> None:
    assert len(list(checkpoint.glob("*.safetensors"))) >= 3
    for rank, loaded in enumerate(run_ranks(_load, RANKS, checkpoint, timeout=90)):
        assert loaded.wrong == []
        own = range(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        needed = set(loaded.slots) | set(own)
        assert len(loaded.slots) == SLOTS_PER_RANK
        matrices = {
            f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": EXPERT_BYTES // 3
            for expert in needed
            for name in ("gate", "up", "down")
        }
        assert loaded.read == matrices | {"model.layers.0.mlp.gate.weight": ROUTER_BYTES}
        allowed = (SLOTS_PER_RANK + len(own)) * EXPERT_BYTES * 1.10
        print(
            f"rank {rank}: read {sum(loaded.read.values()) / MIB:.0f} MiB of {EXPERTS * EXPERT_BYTES / MIB:.0f},"
            f" peak {loaded.peak / MIB:.0f} MiB of {allowed / MIB:.0f} allowed,"
            f" after { {kind: round(grown / MIB) for kind, grown in loaded.grown.items()} }"
        )
        assert loaded.peak <= allowed
