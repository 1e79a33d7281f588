"""Plans side by side, and replays: as text or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from eplbctl.render.interchange import loads_row, loads_told, loss_row, loss_told
from eplbctl.render.tables import Table
from eplbctl.render.tables import text as tables_text

if TYPE_CHECKING:
    from moe_eplb.planning.certificate import Certificate
    from moe_eplb.planning.loads import LoadSet, LossReport
    from moe_eplb.planning.replay import Replayed

__all__ = [
    "bounded", "compared", "costs", "decoded", "notes", "planned_for", "plans_json", "plans_text", "replay_json",
    "replay_text",
]  # fmt: skip

_WORST = 8
_SHADES = " .:-=+*#%@"


def plans_text(
    loads: LoadSet, plans: Sequence[Certificate], written: LossReport | None = None, current: LossReport | None = None
) -> str:
    """A row for each policy, then the layers that the last one leaves worst, and a map of them all."""
    parts = tables_text([compared(plans), bounded(plans), decoded(plans), costs(plans), _layers(loads, plans[-1])])
    return "\n\n".join([_heading(loads, plans[0]), *parts, _map(loads, plans), *notes(loads, plans, current)])


def plans_json(
    loads: LoadSet, plans: Sequence[Certificate], written: LossReport | None = None, current: LossReport | None = None,
    slots: Sequence[list[list[int]]] | None = None,
) -> str:  # fmt: skip
    """Every certificate whole, and where given the experts of the slots of each layer, which no file form can hold."""
    head = {"schema": 1, "loads": loads.source, "windows": loads.windows, "layer_ids": list(loads.layer_ids)}
    others = {"current": current, "written": written}
    files = {"read": loads_row(loads)} | {name: loss_row(one) if one else None for name, one in others.items()}
    certificates = [plan.to_json() for plan in plans]
    if slots is not None:
        certificates = [one | {"slot_experts": held} for one, held in zip(certificates, slots, strict=True)]
    return json.dumps(head | files | {"plans": certificates}, indent=1)


def replay_text(loads: LoadSet, results: Sequence[Replayed], chosen: Replayed, reasons: Sequence[str]) -> str:
    """A row for each setting, then which one is best and why."""
    heads = ("setting", "plans", "now", "next window", "without", "moved a plan", "predicted s", "moves", "plan ms")
    rows = [_replayed(loads, one) for one in results]
    note = "next window: balancedness on the windows after a plan, which is what is served; without: no balancer."
    table = tables_text([Table("Replayed", heads, rows, note)])
    best = [f"Least predicted time: {chosen.setting}", *(f"  {reason}" for reason in reasons)]
    windows, layers, experts = loads.counts.shape
    return "\n\n".join(
        [
            f"{loads.source}: {windows} windows, {layers} layers, {experts} experts", *table, "\n".join(best),
            loads_told(loads),
        ]
    )  # fmt: skip


def replay_json(loads: LoadSet, results: Sequence[Replayed], chosen: Replayed, reasons: Sequence[str]) -> str:
    """Every setting with its series."""
    rows = [_replay_row(one) for one in results]
    head = {"schema": 1, "loads": loads.source, "best": str(chosen.setting), "why": list(reasons)}
    return json.dumps(head | {"read": loads_row(loads), "settings": rows}, indent=1)


def _heading(loads: LoadSet, plan: Certificate) -> str:
    where = f"{plan.experts} experts in {plan.slots} slots of {plan.ranks} ranks, {len(plan.layers)} layers"
    return f"{loads.source}: {planned_for(loads)}; {where}"


def planned_for(loads: LoadSet) -> str:
    """Which window plans are made for."""
    if loads.windows == 1:
        return "one window"
    if not loads.origin.in_order:
        return f"last of {loads.windows} windows, whose order is not known (--merge 0 sums them)"
    return f"newest of {loads.windows} windows"


def compared(plans: Sequence[Certificate]) -> Table:
    """A row for each policy."""
    heads = (
        "policy",
        "balancedness",
        "worst layer",
        "above bound",
        "free split",
        "moved",
        "ms to move",
        "pays after",
        "gate",
        "plan ms",
    )
    rows = [
        (
            plan.policy, f"{plan.balancedness:.4f}", f"{min(row.balancedness for row in plan.layers):.4f}",
            f"{plan.gap:.2%}", f"{plan.free_balancedness:.4f}",
            f"{plan.moved:,} of {plan.kept + plan.moved:,}" if plan.before is not None else "-",
            f"{plan.migration_ms:,.1f}" if plan.before is not None else "-", _windows(plan.break_even),
            {None: "-", True: "pays", False: "does not pay"}[plan.pays], f"{plan.plan_ms:.1f}",
        )
        for plan in plans
    ]  # fmt: skip
    before = plans[0].before
    note = (
        f"Balancedness of what is there: {before:.4f}." if before is not None else "Nothing is there yet (--current)."
    )
    note += " Free split: its balancedness if tokens went to replicas in the best shares instead of equal ones."
    return Table("Policies", heads, rows, note)


def bounded(plans: Sequence[Certificate]) -> Table:
    """What no placement is below, and how often each bound is the one that counts."""
    rows, layers = [], [row.bounds for row in plans[-1].layers]
    best = sum(each.best for each in layers)
    named = (("mean of the ranks", "mean"), ("largest replica", "replica"), ("largest replica and its rank", "beside"))
    for title, name in named:
        values = [getattr(each, name) for each in layers]
        highest = sum(value >= each.best for value, each in zip(values, layers, strict=True))
        rows.append((title, f"{sum(values):,.1f}", highest))
    proved, note = (
        plans[-1].proved,
        "Largest rank loads, which no placement's are below; above bound goes by the highest.",
    )
    if proved is not None:
        rows.append(("optimum, else the highest of these", f"{best:,.1f}", proved))
        note += f" The optimum was proved in {proved} of {len(layers)} layers."
    return Table("Bounds", ("bound", "sum over layers", "is the highest in"), rows, note)


def costs(plans: Sequence[Certificate]) -> Table:
    """What moving to each plan takes, by where experts come from; without rows where nothing is there."""
    rows = [
        (plan.policy, *(f"{count / 1e9:,.2f}" for count in plan.bytes_by_link.values()), f"{plan.migration_ms:,.1f}")
        for plan in plans
        if plan.before is not None
    ]
    ways, links = list(plans[0].bytes_by_link), plans[0].links
    speeds = ", ".join(f"{way.replace('_', ' ')} {links.speed(way):,g}" for way in ways)
    note = f"A slot has {links.slot_bytes / (1 << 20):,.4g} MiB; GB/s: {speeds}. ms of the rank that receives longest."
    return Table("Moves", ("policy", *(f"GB from {way.replace('_', ' ')}" for way in ways), "ms to move"), rows, note)


def decoded(plans: Sequence[Certificate]) -> Table:
    """What a decode step reads under each policy; without rows where it was not asked for."""
    scores = [(plan.policy, plan.decode) for plan in plans if plan.decode is not None]
    rows = [
        (policy, f"{score.touched:.2f}", f"{score.balancedness:.4f}", f"{score.read_us:,.1f}")
        for policy, score in scores
    ]
    pairs = scores[0][1].pairs if scores else 0
    note = "Expected, for pairs that are routed independently by the newest window's loads; each expert is read once."
    heads = ("policy", "experts read on the worst rank", "balancedness of reads", "us to read, all layers")
    return Table(f"A decode step of {pairs:,} routed pairs", heads, rows, note)


def _windows(count: float | None) -> str:
    if count is None:
        return "-"
    return "never" if math.isinf(count) else f"{count:,.2f} windows"


def _layers(loads: LoadSet, plan: Certificate) -> Table:
    worst = sorted(plan.layers, key=lambda row: row.balancedness)[:_WORST]
    rows = [
        (
            loads.layer_ids[row.layer], f"{row.balancedness:.4f}", f"{row.largest:,.1f}", f"{row.bound:,.1f}",
            f"{row.gap:.2%}", row.moved,
        )
        for row in worst
    ]  # fmt: skip
    heads = ("layer", "balancedness", "largest rank load", "bound", "above it", "moved")
    return Table(f"Least balanced layers of {plan.policy}", heads, rows)


def _map(loads: LoadSet, plans: Sequence[Certificate]) -> str:
    """One character a layer: the darker, the less balanced."""
    lines = ["Imbalance by layer (1 - balancedness; ' ' below 1 %, '@' above 50 %)"]
    width = max(len(plan.policy) for plan in plans)
    for plan in plans:
        lines.append(f"  {plan.policy:<{width}} |{''.join(_shade(1 - row.balancedness) for row in plan.layers)}|")
    return "\n".join(lines)


def _shade(imbalance: float) -> str:
    """Logarithmic from 1 % to 50 %."""
    if imbalance <= 0.01:
        return _SHADES[0]
    return _SHADES[min(len(_SHADES) - 1, 1 + int(math.log(imbalance / 0.01) / math.log(50) * (len(_SHADES) - 1)))]


def notes(loads: LoadSet, plans: Sequence[Certificate], current: LossReport | None) -> Iterator[str]:
    """What policies had to say, each once, and how the files were read."""
    yield from dict.fromkeys(f"{plan.policy}: {note}" for plan in plans for note in plan.notes)
    yield from dict.fromkeys(f"optimum: {note}" for plan in plans for note in plan.unproved)
    yield loads_told(loads)
    if current is not None:
        yield loss_told("the current placement", current)


def _replayed(loads: LoadSet, one: Replayed) -> tuple[Any, ...]:
    per_plan = one.moves / one.plans if one.plans else 0
    now = f"{sum(one.now) / len(one.now):.4f}" if one.now else "-"
    without = f"{sum(one.unbalanced) / len(one.unbalanced):.4f}" if one.unbalanced else "-"
    took = f"{sum(one.plan_ms) / len(one.plan_ms):.1f}" if one.plan_ms else "-"
    return (
        str(one.setting), one.plans, now, f"{one.mean_following:.4f}", without, f"{per_plan:,.0f}",
        f"{one.total_us / 1e6:,.3f}", f"{one.moves_us / max(one.total_us, 1e-9):.1%}", took,
    )  # fmt: skip


def _replay_row(one: Replayed) -> dict[str, Any]:
    s = one.setting
    return {
        "policy": s.policy, "interval": s.interval, "window": s.window, "move_share": s.move_share,
        "min_gain": s.min_gain, "now": list(one.now), "next_window": list(one.following),
        "without": list(one.unbalanced), "moves": one.moves, "plans": one.plans, "steps_us": one.steps_us,
        "moves_us": one.moves_us, "plan_ms": list(one.plan_ms),
    }  # fmt: skip
