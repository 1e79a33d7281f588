"""A transformers model generates text under the online balancer, one process for each rank.

    torchrun --nproc-per-node 2 docs/examples/generate.py MODEL_FOLDER

Prints, on every rank, the token ids that it generated and how many slots changed their expert meanwhile.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_eplb.balancer import MoeLoadBalancer
from moe_eplb.core.events import NullSink
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import NullProbe
from moe_eplb.device import get_device
from moe_eplb.integrations.transformers import iterations, load_model, replace_moe_blocks

SLOTS, TOKENS = 12, 24


class Moves(NullProbe):
    """Counts the slots that get another expert."""

    slots = 0

    def committed(self, layer: int, taken: int, placement: Placement, changed: object, moved_bytes: int) -> None:
        self.slots += len(changed)  # type: ignore[arg-type]


@torch.inference_mode()
def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    # Set-up, tokens and statistics each have a process group of their own, so that none waits behind another.
    setup, tokens, statistics = (dist.new_group(list(range(size))) for _ in range(3))
    device, moves = get_device("cpu", NullSink()), Moves()
    model = load_model(folder, seed=0, dtype=torch.float32)

    balancer = MoeLoadBalancer(rank, size, layer_updates_per_iter=1, device=device, group=setup, probe=moves)
    with balancer:
        replace_moe_blocks(model, device, num_slots=SLOTS, ep_group=tokens, statistics_group=statistics)
    balancer.finalize_model()
    balancer.set_iter_info(enable_statistic=True, enable_update_weights=True)

    prompt = torch.arange(8).unsqueeze(0) + 10 * rank
    try:
        with iterations(model, balancer):
            # Every rank must make equally many forwards: no end token here; synced_gpus=True serves where there is one.
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=TOKENS,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
    finally:
        balancer.shutdown()
    said = f"rank {rank}: {output[0, prompt.shape[1] :].tolist()}, {moves.slots} slots changed"
    print(f"{said}\n", end="", flush=True)  # in one write: under torchrun the other rank's would go between two
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
