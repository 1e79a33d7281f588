"""Two compared traces as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from eplbctl.render import tables
from eplbctl.render.tables import Table

if TYPE_CHECKING:
    from moe_eplb.analysis.compare import Compared
    from moe_eplb.core.verdict import CheckResult

__all__ = ["json_text", "markdown", "text"]

_LAYERS = 12


def text(names: tuple[str, str], compared: Sequence[Compared]) -> str:
    """Both medians, the difference with its interval, and what it means."""
    return "\n\n".join([_heading(names), *tables.text(_tables(compared)), *_remarks(compared)])


def markdown(names: tuple[str, str], compared: Sequence[Compared]) -> str:
    """The same for a pull request."""
    return tables.markdown_page(_heading(names), (), _tables(compared), _remarks(compared))


def json_text(names: tuple[str, str], compared: Sequence[Compared], checks: Sequence[CheckResult]) -> str:
    """Everything, layers too; values in us."""
    rows = [asdict(one) | {"change": one.change.value} for one in compared]
    judged = [asdict(check) | {"status": check.status.value} for check in checks]
    return json.dumps({"schema": 1, "traces": list(names), "compared": rows, "checks": judged}, indent=2)


def _heading(names: tuple[str, str]) -> str:
    return f"{names[0]} -> {names[1]}"


def _tables(compared: Sequence[Compared]) -> Iterator[Table]:
    whole = [one for one in compared if one.layer < 0]
    layers = [one for one in compared if one.layer >= 0]
    yield Table("By iteration", ("metric", *_HEADS), [(one.metric, *_cells(one)) for one in whole])
    most = sorted(layers, key=lambda one: (-(one.difference.median if one.difference else 0), one.layer))[:_LAYERS]
    note = f"The {_LAYERS} of {len(layers)} that grew most; --format json has all." if len(layers) > _LAYERS else ""
    rows = [(one.layer, *_cells(one)) for one in most]
    yield Table("Balancer work that nothing hides, by layer", ("layer", *_HEADS), rows, note)


_HEADS = ("pairs", "first us", "second us", "difference us", "95 %", "change")


def _cells(one: Compared) -> tuple[str, ...]:
    if one.difference is None or one.first_us is None or one.second_us is None:
        return "0", "-", "-", "-", "-", one.change.value
    d = one.difference
    interval = f"{d.low:+.3f} to {d.high:+.3f}"
    return str(one.pairs), f"{one.first_us:.3f}", f"{one.second_us:.3f}", f"{d.median:+.3f}", interval, one.change.value


def _remarks(compared: Sequence[Compared]) -> Iterator[str]:
    if any(one.change.value == "unknown" for one in compared):
        yield "Unknown: too few iterations in common, see --min-iterations."
