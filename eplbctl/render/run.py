"""What a run shows when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eplbctl.render.run_tables import balance_and_moves, plans_waited_for
from eplbctl.render.text import check_table

if TYPE_CHECKING:
    from moe_eplb.analysis.reproduction import Reproduction
    from moe_eplb.analysis.stages import Report
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import RunResult

__all__ = ["next_commands", "reproduction_text", "result_text"]


def result_text(scenario: Scenario, result: RunResult, report: Report) -> str:
    """Headline, checks, balancedness, moves, plans that were waited for, run folder."""
    parts = [_headline(scenario, result), check_table(result.verdict), balance_and_moves(report)]
    parts += plans_waited_for(report)
    parts += [f"run folder: {result.folder}"]
    return "\n\n".join(part for part in parts if part)


def next_commands(result: RunResult) -> str:
    """The exact commands that a reader of the result will want next."""
    folder = result.folder
    return "\n".join(
        [
            "next:",
            f"  eplbctl report {folder}   # stages, moves, balancedness, overlap",
            f"  eplbctl verify {folder}   # judge it again",
            f"  eplbctl run {folder}      # reproduce it",
        ]
    )


def reproduction_text(first: Path, compared: Reproduction) -> str:
    """Whether the run is the same as the first one."""
    if not compared.places:
        return f"not compared with {first}: neither run recorded a placement"
    if compared.first_difference is not None:
        return f"NOT reproduced: the placements differ from those of {first} from {compared.first_difference} on"
    return f"reproduced: all {compared.places} placements (layers x iterations) are those of {first}"


def _headline(scenario: Scenario, result: RunResult) -> str:
    model = scenario.model
    word = "failed" if result.verdict.failure else result.verdict.status.value
    size = f"{scenario.ranks} ranks, {model.layers} layers, {model.experts} experts in {scenario.slots} slots"
    steps = f"{scenario.iterations} iterations, seed {scenario.seed}"
    return f"{scenario.name}: {word} in {result.seconds:.1f} s ({size}, {steps})"
