"""Plain text for people: tables and short summaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eplbctl.outcome import Outcome
from moe_eplb.core.verdict import CheckResult, Status, Verdict

__all__ = ["check_table", "outcome_details", "summary", "table"]

_CELL = 44


def table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], *, style: str = "simple", width: int | None = None
) -> str:
    """A table; empty cells for None. `style` is one of tabulate's; cells wider than `width` are wrapped."""
    from tabulate import tabulate

    # Without disable_numparse a digest or a version would be shown as a rounded float.
    return tabulate(rows, headers=headers, tablefmt=style, missingval="", disable_numparse=True, maxcolwidths=width)


def check_table(verdict: Verdict) -> str:
    """Why a run failed, every check with what was seen and what was needed, the detail of those that are not valid."""
    rows = [(check.name, check.status.value, check.observed, check.expected) for check in verdict.checks]
    parts = [table(("check", "status", "observed", "expected"), rows, width=_CELL)] if rows else []
    return "\n".join(_failure(verdict) + parts + _details(verdict))


def outcome_details(outcome: Outcome) -> str:
    """One outcome that is not valid: its headline and why."""
    return "\n".join(
        [f"{outcome.name}: {outcome.word} ({outcome.path})", *_failure(outcome.verdict), *_details(outcome.verdict)]
    )


def summary(outcomes: Sequence[Outcome], *, not_run: int) -> str:
    """One line an outcome, why those that are not valid are not, and the count of each word."""
    rows = [(o.name, o.word, f"{len(o.verdict.checks)} checks", f"{o.seconds:.1f} s") for o in outcomes]
    parts = [table(("scenario", "verdict", "judged", "time"), rows)]
    parts += [outcome_details(outcome) for outcome in outcomes if outcome.word != "valid"]
    words = [outcome.word for outcome in outcomes]
    counts = [f"{words.count(word)} {word}" for word in ("failed", "invalid", "unknown", "valid") if word in words]
    counts += [f"{not_run} not run"] if not_run else []
    return "\n\n".join([*parts, ", ".join(counts)])


def _failure(verdict: Verdict) -> list[str]:
    return [f"  {line}" for line in verdict.failure.splitlines()]


def _details(verdict: Verdict) -> list[str]:
    """What is wrong; that the evidence of a run which failed is incomplete needs no further explanation."""
    explained = (Status.INVALID,) if verdict.failure else (Status.INVALID, Status.UNKNOWN)
    lines = [line for check in verdict.checks if check.status in explained for line in _explain(check)]
    return lines + [f"  note: {note}" for note in verdict.notes]


def _explain(check: CheckResult) -> list[str]:
    lines = [f"  {check.name} is {check.status.value}: {check.observed}; expected {check.expected}"]
    lines += [f"    at {check.where}"] if check.where else []
    lines += [f"    {line}" for line in check.detail.splitlines()]
    return lines
