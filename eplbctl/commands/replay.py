"""``eplbctl replay``: the online balancer over recorded windows, without weights and without ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, FiniteRange, format_option, loads_options, output_options
from eplbctl.progress import Progress
from moe_eplb.core.errors import UsageError

if TYPE_CHECKING:
    from moe_eplb.planning.formats.loads import Reading
    from moe_eplb.planning.loads import LoadSet
    from moe_eplb.planning.replay import CostModel, Replayed, Setting

__all__ = ["command"]


@click.command()
@click.argument("loads", type=PATH)
@click.option("--ranks", type=click.IntRange(1, 4096), required=True, help="Expert-parallel ranks.")
@click.option("--slots", type=click.IntRange(1), required=True, help="Slots of all ranks together.")
@click.option(
    "--policy", "policies", default="static,greedy,incremental,robust", show_default=True, help="With commas."
)
@click.option("--interval", type=click.IntRange(1), default=1, show_default=True, help="Windows between two plans.")
@click.option("--window", type=click.IntRange(1), default=8, show_default=True, help="Windows that robust plans from.")
@click.option("--max-moves", type=FiniteRange(0, 100), metavar="PERCENT", help="Of all slots that a plan may change.")
@click.option(
    "--min-gain",
    type=FiniteRange(0),
    default=0.0,
    metavar="PERCENT",
    help="Least growth of a layer's balancedness that pays.",
)
@click.option(
    "--search",
    is_flag=True,
    help="Try a grid of intervals, windows and budgets for each policy, with and without --min-gain.",
)
@click.option("--us-per-token", type=FiniteRange(0), default=0.05, show_default=True, help="Of a token on its rank.")
@click.option("--slot-mib", type=FiniteRange(0), default=42.0, show_default=True, help="Size of an expert's weights.")
@click.option("--link-gb-s", type=FiniteRange(0.001), default=50.0, show_default=True, help="Speed of moves.")
@click.option(
    "--hidden", type=FiniteRange(0, 1), default=0.9, show_default=True, help="Share of moves that costs nothing."
)
@loads_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of policies that draw.")
@format_option("text", "json")
@output_options
def command(
    loads: Path, ranks: int, slots: int, policies: str, interval: int, window: int, max_moves: float | None,
    min_gain: float, search: bool, us_per_token: float, slot_mib: float, link_gb_s: float, hidden: float,
    reading: Reading, seed: int, form: str, destination: Destination,
) -> None:  # fmt: skip
    """Replay LOADS window by window: plan, serve the next window, plan again.

    LOADS is what `eplbctl plan` takes. It says how balanced each window was under the placement that was made before
    it, what moved, and the time that a simple cost model predicts; and which setting is best and why.

    \b
    Examples:
      eplbctl replay loads.npz --ranks 32 --slots 288
      eplbctl replay loads.npz --ranks 8 --slots 40 --policy incremental,robust --search --format json -o replay.json
    """
    from eplbctl.render import plans as render
    from moe_eplb.planning.formats.loads import read_counts
    from moe_eplb.planning.replay import CostModel, best, why

    read = read_counts(loads, reading)
    if read.windows < 2:
        raise UsageError("E194", "there is nothing to replay", why="one window", hint="use eplbctl plan")
    cost = CostModel(us_per_token, slot_bytes=int(slot_mib * (1 << 20)), link_gb_s=link_gb_s, hidden=hidden)
    share, gain = None if max_moves is None else max_moves / 100, min_gain / 100
    settings = _settings(read, policies, interval, window, share, gain, search)
    results = _replayed(read, ranks, slots, settings, cost, seed)
    chosen = best(results)
    made = render.replay_text if form == "text" else render.replay_json
    destination.write(made(read, results, chosen, why(chosen, results)))


def _settings(
    loads: LoadSet, policies: str, interval: int, window: int, share: float | None, gain: float, search: bool
) -> list[Setting]:
    from moe_eplb.planning.policies import POLICIES
    from moe_eplb.planning.replay import Setting, settings_to_try

    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names or any(name not in POLICIES for name in names):
        raise UsageError("E191", f"--policy {policies!r} names no policy", hint=f"some of {', '.join(POLICIES)}")
    if search:
        return settings_to_try(names, loads.windows, gain)
    shares = dict.fromkeys(("incremental", "robust"), share)
    gains = {"static": 0.0}  # it moves nothing that could pay
    return [Setting(name, interval, window, shares.get(name), gains.get(name, gain)) for name in names]


def _replayed(
    loads: LoadSet, ranks: int, slots: int, settings: list[Setting], cost: CostModel, seed: int
) -> list[Replayed]:
    from moe_eplb.planning.replay import replay

    total = len(settings) * loads.windows
    counts = loads.counts.astype("float64")
    results: list[Replayed] = []
    with Progress("replay", "window") as progress:
        for number, setting in enumerate(settings):
            told = partial(_tell, progress, number * loads.windows, total)
            results.append(replay(counts, ranks, slots, setting, cost, seed=seed, progress=told))
    return results


def _tell(progress: Progress, before: int, total: int, now: int, windows: int) -> None:
    """Progress of all settings from that of one."""
    progress(before + now, total)
