"""A rank's two grouped products and SwiGLU by how few rows an expert has: torch's kernels, and ours however cut.

    python -m benchmarks.gpu.few_rows --out FILE.json

Exit 2 where there is no GPU, 1 where a bit differs from torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.gpu import gain
from benchmarks.gpu.layer_cases import drawn
from benchmarks.gpu.machine import machine, require_gpus, write
from benchmarks.gpu.timing import ceilings, time_in_turns, told
from moe_eplb.device import ops
from moe_eplb.device.ops.plain_parts import parts_of
from moe_eplb.moe.grouped_mm import grouped_mm

if TYPE_CHECKING:
    from moe_eplb.device.ops.triton_ffn import Tiles

__all__ = ["Sizes", "main", "rows_of", "summary"]

_ZIPF = 0.8


class Sizes(NamedTuple):
    """A rank's slots and the sizes of an expert."""

    slots: int
    hidden: int
    intermediate: int

    @property
    def expert_bytes(self) -> int:
        """Of an expert's weights in bfloat16."""
        return 6 * self.hidden * self.intermediate


_SLOTS = {"qwen3-30b": 128, "deepseek-v3": 35}
MODELS = {
    name: Sizes(slots, gain.MODELS[name]["hidden"], gain.MODELS[name]["intermediate"]) for name, slots in _SLOTS.items()
}
EACH = (1, 2, 8, 16, 32, 64, 128, 256)
"""Rows a slot, on average."""


class Given(NamedTuple):
    """Rows [N, D] by slot, their ends int32 [S], and the weights."""

    rows: Tensor
    offs: Tensor
    w3_w1: Tensor
    w2: Tensor


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the JSON goes.")
@click.option("--replays", type=click.IntRange(min=2), default=24, show_default=True, help="Products of each kind.")
def main(out: Path, replays: int) -> None:
    """Time both products for few rows an expert."""
    require_gpus()
    with torch.inference_mode():
        limits = ceilings()
        found = [_measure(*case, replays) for case in product(MODELS, EACH, (True, False))]
    result = {**machine("benchmarks.gpu.few_rows"), "replays": replays, "ceilings": limits, "cases": found}
    write(out, result)
    click.echo(_table(found))
    click.echo(told(limits))
    if wrong := [case["name"] for case in found if case["differing"]]:
        click.echo(f"bits differ from torch's: {', '.join(wrong)}", err=True)
        raise SystemExit(1)


def rows_of(slots: int, entries: int, *, even: bool, generator: torch.Generator) -> Tensor:
    """Rows int64 [S] of each slot: drawn evenly, or where slot s has the weight ``1 / (1 + s) ** 0.8``."""
    weight = torch.ones(slots) if even else 1 / (1 + torch.arange(slots)) ** _ZIPF
    return torch.bincount(torch.multinomial(weight, entries, replacement=True, generator=generator), minlength=slots)


def _measure(name: str, each: int, even: bool, replays: int) -> dict[str, Any]:
    from moe_eplb.device.ops import triton_ffn  # tests on a CPU turn Triton's interpreter on before it is imported

    sizes, generator = MODELS[name], torch.Generator().manual_seed(each)
    rows = rows_of(sizes.slots, each * sizes.slots, even=even, generator=generator)
    given = _given(sizes, rows)
    cuts = {
        str(tuple(cut)): cut
        for cut in (triton_ffn.tiles(ops.part_rows(n), gated=gated) for n in EACH for gated in (True, False))
    }
    chosen = [str(tuple(triton_ffn.tiles(ops.part_rows(each), gated=gated))) for gated in (True, False)]
    work, differing = _work(given, cuts)
    samples = time_in_turns(work, replays)
    touched = int((rows > 0).sum()) * sizes.expert_bytes
    return {
        "name": f"{name}, {each} {'even' if even else 'zipf'}", "rows": rows.tolist(), "chosen": chosen,
        "differing": differing, "samples_ms": samples, **summary(samples, chosen, touched),
    }  # fmt: skip


def _given(sizes: Sizes, rows: Tensor) -> Given:
    draw = partial(drawn, torch.Generator("cuda").manual_seed(1))
    up = draw(sizes.slots, 2 * sizes.intermediate, sizes.hidden) * sizes.hidden**-0.5
    down = draw(sizes.slots, sizes.hidden, sizes.intermediate) * sizes.intermediate**-0.5
    return Given(draw(int(rows.sum()), sizes.hidden), rows.cumsum(0).int().cuda(), up, down)


def _work(given: Given, cuts: Mapping[str, Tiles]) -> tuple[dict[str, Callable[[], object]], int]:
    """What is timed, as "1 ..." and "2 ..." by the product, and how many results are not torch's to the bit."""
    from moe_eplb.device.ops import triton_ffn

    def swiglu() -> Tensor:
        return ops.swiglu(grouped_mm(given.rows, given.w3_w1.transpose(1, 2), offs=given.offs), given.offs)

    activated = swiglu()
    second = partial(grouped_mm, activated, given.w2.transpose(1, 2), offs=given.offs)
    work: dict[str, Callable[[], object]] = {"1 torch": swiglu, "2 torch": second}
    cells, differing = torch.arange(len(given.offs), device=given.offs.device), 0
    for name, cut in cuts.items():
        parts = parts_of(given.offs, cells, cut.rows, len(given.rows))
        for number, rows, weights, wanted in (
            (1, given.rows, given.w3_w1, activated), (2, activated, given.w2, second()),
        ):  # fmt: skip
            ours = partial(triton_ffn.launch, rows, weights, parts, cut, gated=number == 1)
            differing += int((ours() != wanted).sum())
            work[f"{number} {name}"] = ours
    return work, differing


def summary(samples: Mapping[str, Sequence[float]], chosen: Sequence[str], touched: int) -> dict[str, float]:
    """Microseconds of both products by torch, as they are cut and as they are cut best; TB/s of the weights' bytes."""
    us = {name: 1e3 * median(found) for name, found in samples.items()}
    torchs = us["1 torch"] + us["2 torch"]
    ours = sum(us[f"{number} {name}"] for number, name in enumerate(chosen, 1))
    best = sum(min(found for name, found in us.items() if name[0] == number and "torch" not in name) for number in "12")
    rates = {"torch_tb_per_s": touched / torchs / 1e6, "ours_tb_per_s": touched / ours / 1e6}
    return {"torch_us": torchs, "ours_us": ours, "best_us": best, "ratio": ours / torchs, **rates}


def _table(cases: Sequence[Mapping[str, Any]]) -> str:
    columns = ("torch_us", "ours_us", "best_us", "ratio", "torch_tb_per_s", "ours_tb_per_s", "differing")
    rows = [[case["name"], *(case[column] for column in columns)] for case in cases]
    return tabulate(rows, headers=["rows a slot", *columns], floatfmt=".3f")


if __name__ == "__main__":
    main()
