"""A TensorRT-LLM balancer file as the balancer section of a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_eplb.core import config
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.yaml_source import Document

__all__ = ["merge"]

_KEYS = ("num_slots", "slots_per_rank", "layer_updates_per_iter", "initial_global_assignments")


def merge(document: Document) -> None:
    """Replace ``balancer.config`` in the data by what that file says, so that the scenario needs the file no more.

    The file numbers layers as the model does, dense ones included; in ascending order they become layers 0, 1, ...
    A key given in both places is an error (E032), since one of the two would be ignored.
    """
    section = document.data.get("balancer")
    if not isinstance(section, dict) or not isinstance(section.get("config"), str):
        return
    if both := [key for key in _KEYS if section.get(key) is not None]:
        where = document.where(("balancer", both[0]), key=True)
        raise ScenarioError(
            "E032", f"{both[0]!r} is given here and by 'config'", hint="remove one of them", where=where
        )
    read = config.load(Path(section.pop("config")))
    _check_ranks(document, read.ep_size)
    section["num_slots"] = read.num_slots
    section["layer_updates_per_iter"] = read.layer_updates_per_iter
    if read.initial_global_assignments is not None:
        in_order = sorted(read.initial_global_assignments.items())
        section["initial_global_assignments"] = {i: list(experts) for i, (_, experts) in enumerate(in_order)}


def _check_ranks(document: Document, ep_size: int | None) -> None:
    ranks: Any = document.data.get("ranks")
    if ep_size is not None and ep_size != ranks:
        why = f"ep_size {ep_size} in the file, ranks {ranks} in the scenario"
        where = document.where(("balancer", "config"))
        raise ScenarioError("E032", "the balancer file is made for another number of ranks", why=why, where=where)
