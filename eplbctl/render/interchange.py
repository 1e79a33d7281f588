"""What was read from a file and what was written to one: in which form, and what such a form does not hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_eplb.planning.loads import LoadSet, LossReport
    from moe_eplb.planning.placements import PlacementSet

__all__ = ["converted_json", "converted_text", "loads_row", "loads_told", "loss_row", "loss_told", "placement_told"]


def loads_told(loads: LoadSet) -> str:
    """How loads were read, a line each: the form, the layers' numbers, what was assumed, what is unknown."""
    windows, layers, experts = loads.counts.shape
    head = f"read as {loads.read.form}: {windows} windows, {layers} layers, {experts} experts"
    return "\n".join([head, _layers(loads), *(f"note: {note}" for note in loads.notes), *_lost(loads.read)])


def placement_told(placement: PlacementSet) -> str:
    """The same of a placement."""
    layers, slots = placement.slots.shape
    head = f"read as {placement.read.form}: {placement.experts} experts in {slots} slots of {placement.ranks} ranks"
    return "\n".join([f"{head}, {layers} layers", _layers(placement), *_lost(placement.read)])


def loss_told(what: str, report: LossReport) -> str:
    """How another file was read, a line each."""
    return "\n".join([f"{what} read as {report.form}", *_lost(report)])


def loads_row(loads: LoadSet) -> dict[str, Any]:
    """How loads were read, and what is known of them, as plain data."""
    known = asdict(loads.origin)
    if known["iterations"] is not None:
        known["iterations"] = [known["iterations"][0], known["iterations"][-1]]
    return loss_row(loads.read) | {"numbered": loads.numbered, "notes": list(loads.notes), "origin": known}


def loss_row(report: LossReport) -> dict[str, Any]:
    """A report as plain data."""
    return {"form": report.form, "lost": list(report.lost), "left_out": list(report.left_out)}


def converted_text(told: str, report: LossReport, output: Path) -> str:
    """What was read and written."""
    lines = [f"wrote {output} as {report.form}", *(f"not in {output}: {lost}" for lost in report.lost)]
    return "\n".join([told, *lines])


def converted_json(found: LoadSet | PlacementSet, report: LossReport, output: Path) -> str:
    """What was read and written, as JSON."""
    from moe_eplb.planning.loads import LoadSet

    read = loads_row(found) if isinstance(found, LoadSet) else loss_row(found.read) | {"numbered": found.numbered}
    head = {"schema": 1, "source": found.source, "layer_ids": list(found.layer_ids)}
    return json.dumps(head | {"read": read, "written": loss_row(report) | {"path": str(output)}}, indent=1)


def _layers(found: LoadSet | PlacementSet) -> str:
    from moe_eplb.planning.loads import layers_text

    numbers = layers_text(found.layer_ids)
    if found.numbered:
        return f"layers {numbers}, as the model numbers them"
    return f"layers {numbers}, counted among those with experts: the file does not say the model's numbers (--layers)"


def _lost(report: LossReport) -> list[str]:
    lines = [f"unknown, since this form does not hold it: {'; '.join(report.lost)}"] if report.lost else []
    return lines + ([f"there, but not kept: {'; '.join(report.left_out)}"] if report.left_out else [])
