"""``eplbctl plan``: placements for recorded loads by several policies side by side, and in other stacks' files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, FiniteRange, format_option, loads_options
from eplbctl.output import require_writable, say, without_stdout, write_file
from eplbctl.progress import Progress
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from moe_eplb.planning.certificate import Certificate, Links
    from moe_eplb.planning.exact import Optima
    from moe_eplb.planning.formats.loads import Reading
    from moe_eplb.planning.loads import LoadSet, LossReport
    from moe_eplb.planning.placements import PlacementSet
    from moe_eplb.planning.problem import Problem, Solution

__all__ = ["command"]

_FORMS = ("json", "tensorrt_llm", "sglang", "vllm", "ascend", "omni")


@click.command()
@click.argument("loads", type=PATH)
@click.option("--ranks", type=click.IntRange(1, 4096), required=True, help="Expert-parallel ranks.")
@click.option("--slots", type=click.IntRange(1), required=True, help="Slots of all ranks together.")
@click.option(
    "--policy",
    "policies",
    default="greedy,refine",
    show_default=True,
    help="Policies with commas; the last is written.",
)
@click.option("--current", type=PATH, help="The placement that is there, in any of the forms of --to.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes of as many ranks each.")
@click.option(
    "--groups", type=click.IntRange(1), default=1, show_default=True, help="Expert groups that stay on a node."
)
@click.option("--allow-duplicates", is_flag=True, help="Let two replicas of an expert lie on one rank.")
@click.option("--rank-slots", metavar="N,N,...", help="Slots of each rank, where they differ.")
@click.option("--mask", metavar="RANK,...", help="Ranks that must hold nothing.")
@click.option("--max-moves", type=FiniteRange(0, 100), metavar="PERCENT", help="Of all slots that may change.")
@click.option("--time-budget-ms", type=FiniteRange(0.1), help="Answer with the best so far after so long.")
@click.option("--min-gain", type=FiniteRange(0), metavar="PERCENT", help="Least growth of balancedness that pays.")
@click.option(
    "--decode-pairs", type=click.IntRange(1), metavar="PAIRS", help="Score what a step of so many tokens x top-k reads."
)
@click.option(
    "--exact",
    type=FiniteRange(0, min_open=True),
    metavar="SECONDS",
    help="Look for each layer's optimum for so long; up to 64 slots.",
)
@click.option(
    "--slot-mib", type=FiniteRange(0.001), default=42.0, show_default=True, help="Size of an expert's weights."
)
@click.option(
    "--bandwidth",
    metavar="LINK=GB/S,...",
    help="Other speeds than same_rank=1500,same_node=150,cross_node=25,host=50,memory=3350.",
)
@click.option("--us-per-token", type=FiniteRange(0), default=0.05, show_default=True, help="Of a token on its rank.")
@loads_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of policies that draw.")
@click.option("-o", "--output", type=PATH, help="Write the last policy's placement here.")
@click.option("--to", "target", type=click.Choice(_FORMS), default="json", show_default=True, help="Form of that file.")
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@format_option("text", "json", "html")
def command(
    loads: Path, ranks: int, slots: int, policies: str, current: Path | None, nodes: int, groups: int,
    allow_duplicates: bool, rank_slots: str | None, mask: str | None, max_moves: float | None,
    time_budget_ms: float | None, min_gain: float | None, decode_pairs: int | None, exact: float | None,
    slot_mib: float, bandwidth: str | None, us_per_token: float, reading: Reading, seed: int, output: Path | None,
    target: str, force: bool, form: str,
) -> ExitCode:  # fmt: skip
    """Place experts for LOADS, and say how good that is, how good it could be, and what moving there costs.

    LOADS is a run folder, an .npz with counts [windows, layers, experts] or topk_ids, or what TensorRT-LLM, SGLang or
    vLLM record (see `eplbctl convert loads`). Policies: static, greedy (DeepSeek's algorithm), refine (greedy
    improved), incremental (from --current with few moves), robust (the same for all windows). If the last plan does
    not pay (--min-gain), the exit code is 1 and -o writes nothing.

    \b
    Examples:
      eplbctl plan loads.npz --ranks 32 --slots 288
      eplbctl plan loads.npz --ranks 8 --slots 288 --current now.json --policy greedy,incremental --min-gain 2
      eplbctl plan loads.npz --ranks 8 --slots 40 --exact 10 --current now.json --bandwidth cross_node=50
      eplbctl plan loads.npz --ranks 32 --slots 288 --policy static,greedy,refine --format html > plan.html
      eplbctl plan loads.npz --ranks 8 --slots 288 --policy refine -o placement.yaml --to tensorrt_llm
    """
    from eplbctl.render import plans as render
    from moe_eplb.planning.formats.loads import read_counts

    links, room = _links(slot_mib, bandwidth, us_per_token), _room(rank_slots, mask)
    if output is not None:
        _require_a_form(room)
        require_writable(output, force=force)
    read = read_counts(loads, reading)
    placed = _current(read, current, ranks)
    problem = _problem(
        read, placed, ranks, slots, nodes, groups, allow_duplicates, max_moves, time_budget_ms, seed, room
    )
    gain = None if min_gain is None else min_gain / 100
    solutions, optima = _solved(problem, policies, exact)
    certificates = _certified(problem, solutions, links, gain, decode_pairs, optima)
    refused = certificates[-1].pays is False
    written = None if output is None or refused else _write(read, problem, solutions[-1], output, target)
    if output is not None and refused:
        say(f"{output} was not written: {solutions[-1].policy} gains less than --min-gain asks for", err=True)
    current_read = None if placed is None else placed.read
    if form == "html":
        made = _page(read, problem, solutions, certificates, current_read)
    elif form == "json":
        held = [solution.slots.tolist() for solution in solutions] if room else None
        made = render.plans_json(read, certificates, written, current_read, held)
    else:
        made = render.plans_text(read, certificates, written, current_read)
    Destination(None).write(made)
    return ExitCode.INVALID if refused else ExitCode.VALID


def _current(loads: LoadSet, path: Path | None, ranks: int) -> PlacementSet | None:
    if path is None:
        return None
    from moe_eplb.planning.formats.placements import read_placement
    from moe_eplb.planning.placements import require_fit

    return require_fit(loads, read_placement(path, ranks=ranks))


def _problem(
    loads: LoadSet, placed: PlacementSet | None, ranks: int, slots: int, nodes: int, groups: int,
    allow_duplicates: bool, max_moves: float | None, time_budget_ms: float | None, seed: int,
    room: dict[str, tuple[int, ...]],
) -> Problem:  # fmt: skip
    from moe_eplb.planning.problem import Problem

    layers = loads.counts.shape[1]
    return Problem(
        loads.counts.astype("float64"), ranks, slots, nodes=nodes, groups=groups, allow_duplicates=allow_duplicates,
        current=None if placed is None else placed.slots, time_budget_ms=time_budget_ms, seed=seed,
        max_moves=None if max_moves is None else int(max_moves / 100 * slots * layers), **room,
    )  # fmt: skip


def _solved(problem: Problem, policies: str, exact: float | None) -> tuple[list[Solution], Optima | None]:
    from moe_eplb.planning.policies import solve

    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise UsageError("E191", "no policy is named", hint="such as --policy greedy,refine")
    from moe_eplb.planning.exact import prove, require_provable

    if exact is not None:
        require_provable(problem)
    with _without_blas():
        solutions = [solve(problem, name) for name in names]
    if exact is None:
        return solutions, None
    with Progress("optimum", "layer") as progress, without_stdout():
        return solutions, prove(problem, solutions, exact, progress)


@contextmanager
def _without_blas() -> Iterator[None]:
    """While numba loads it finds no BLAS in scipy: no kernel needs it, and to load it takes a sixth of the command."""
    name = "scipy.linalg.cython_blas"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _room(rank_slots: str | None, mask: str | None) -> dict[str, tuple[int, ...]]:
    """Arguments of `Problem` for ranks that differ."""
    given = {"slots_per_rank": ("--rank-slots", rank_slots), "masked_ranks": ("--mask", mask)}
    return {name: _numbers(option, text) for name, (option, text) in given.items() if text is not None}


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 9 for part in parts):
        raise UsageError("E190", f"{option} {text!r} does not parse", hint="whole numbers with commas, such as 9,9,8")
    return tuple(map(int, parts))


def _require_a_form(room: dict[str, tuple[int, ...]]) -> None:
    if room:
        raise UsageError(
            "E196", "no form of a file holds ranks that differ", why=f"{', '.join(sorted(room))} was given",
            hint="leave -o out; --format json has the experts of all slots",
        )  # fmt: skip


def _links(slot_mib: float, bandwidth: str | None, us_per_token: float) -> Links:
    from moe_eplb.planning.certificate import Links

    links = Links(slot_bytes=int(slot_mib * (1 << 20)), us_per_token=us_per_token)
    return links if bandwidth is None else links.with_speeds(bandwidth)


def _certified(
    problem: Problem, solutions: list[Solution], links: Links, gain: float | None, pairs: int | None,
    optima: Optima | None,
) -> list[Certificate]:  # fmt: skip
    from moe_eplb.planning.certificate import certify

    return [certify(problem, solution, links, gain, pairs, optima) for solution in solutions]


def _page(
    loads: LoadSet, problem: Problem, solutions: list[Solution], certificates: list[Certificate],
    current: LossReport | None,
) -> str:  # fmt: skip
    from eplbctl.render.plan_page import plans_page
    from moe_eplb.planning.heat import LEVELS, slot_levels

    levels = [slot_levels(problem, solution) for solution in solutions]
    return plans_page(loads, certificates, levels, LEVELS, current)


def _write(loads: LoadSet, problem: Problem, solution: Solution, output: Path, form: str) -> LossReport:
    from moe_eplb.planning.formats.placements import write_placement
    from moe_eplb.planning.placements import PlacementSet

    source = f"{solution.policy} for {loads.source}"
    made = PlacementSet(solution.slots, problem.ranks, problem.experts, loads.layer_ids, source, loads.numbered)
    content, report = write_placement(made, form)
    write_file(output, content)
    for lost in report.lost:
        say(f"not in {output}: {lost}", err=True)
    return report
