"""Plans side by side as one page that needs nothing else: certificates, layers, and what every slot carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from eplbctl.render.html import cells, digest, template
from eplbctl.render.inert import inert
from eplbctl.render.plans import bounded, compared, costs, decoded, notes, planned_for
from eplbctl.render.png import data_uri, png
from eplbctl.render.tables import Table

if TYPE_CHECKING:
    from moe_eplb.planning.certificate import Certificate
    from moe_eplb.planning.loads import LoadSet, LossReport

__all__ = ["plans_page"]

_EVEN, _LESS, _MORE = (245, 245, 245), (5, 60, 140), (160, 10, 30)
_STYLE = """
.maps { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 100%; }
img { image-rendering: pixelated; max-width: 100%; border: 1px solid var(--line); }
"""


def plans_page(
    loads: LoadSet, plans: Sequence[Certificate], levels: Sequence[Sequence[bytes]], most_levels: int,
    current: LossReport | None = None,
) -> str:  # fmt: skip
    """The page.

    Args:
        levels: For each plan a row of bytes for each layer, a level of load for each slot.
        most_levels: How many levels there are; the upper half is above a slot's even share.
        current: How the current placement was read.
    """
    palette = _palette(most_levels)
    style = template("report.css") + _STYLE
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    made: str = environment.from_string(template("plan.html.j2")).render(
        title=inert(f"Plans for {loads.source}", 2000), facts=_facts(loads, plans[0]),
        notes=[inert(line, 2000) for text in notes(loads, plans, current) for line in text.splitlines()],
        tables=[cells(part) for part in _tables(loads, plans) if part.rows],
        maps=[_map(plan, rows, palette) for plan, rows in zip(plans, levels, strict=True)],
        per_rank=f"{plans[0].slots / plans[0].ranks:g}", style=Markup(style), style_hash=digest(style),
    )  # fmt: skip
    return made


def _facts(loads: LoadSet, plan: Certificate) -> list[tuple[str, str]]:
    facts = [
        ("loads", loads.source), ("planned for", planned_for(loads)),
        ("experts", f"{plan.experts} in {plan.slots} slots of {plan.ranks} ranks"), ("layers", str(len(plan.layers))),
    ]  # fmt: skip
    return [(name, inert(value, 2000)) for name, value in facts]


def _tables(loads: LoadSet, plans: Sequence[Certificate]) -> list[Table]:
    return [compared(plans), bounded(plans), decoded(plans), costs(plans), _layers(loads, plans)]


def _layers(loads: LoadSet, plans: Sequence[Certificate]) -> Table:
    rows = [
        (loads.layer_ids[number], f"{plans[0].layers[number].bound:,.1f}", *_of_layer(plans, number))
        for number in range(len(loads.layer_ids))
    ]
    heads = [f"{plan.policy}{what}" for plan in plans for what in (": largest rank load", ": balancedness")]
    note = "The bound is a rank load that no placement's largest one is below, in tokens like the loads."
    return Table("Layers", ("layer", "bound", *heads), rows, note)


def _of_layer(plans: Sequence[Certificate], number: int) -> list[str]:
    return [
        text
        for plan in plans
        for text in (f"{plan.layers[number].largest:,.1f}", f"{plan.layers[number].balancedness:.4f}")
    ]


def _map(plan: Certificate, rows: Sequence[bytes], palette: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    return {
        "policy": inert(plan.policy), "picture": data_uri(png(rows, palette)), "moved": plan.moved,
        "balancedness": f"{plan.balancedness:.4f}", "worst": f"{min(row.balancedness for row in plan.layers):.4f}",
        "width": max(plan.slots * 2, 200), "height": max(len(rows) * 4, 24),
    }  # fmt: skip


def _palette(levels: int) -> list[tuple[int, int, int]]:
    """From blue by near white to red."""
    half = levels // 2
    less = [_mixed(_LESS, _EVEN, place / half) for place in range(half)]
    more = [_mixed(_EVEN, _MORE, (place + 1) / (levels - half)) for place in range(levels - half)]
    return less + more


def _mixed(one: tuple[int, int, int], other: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
