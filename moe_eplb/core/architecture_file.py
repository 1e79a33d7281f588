"""A Hugging Face configuration as the model section of a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_eplb.core import architecture
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.yaml_source import Document

__all__ = ["merge"]

_SIZES = ("experts", "top_k", "hidden", "intermediate", "shared_intermediate", "routing")


def merge(document: Document) -> None:
    """Fill the model section from ``model.hf``'s config.json, so that the scenario says all sizes itself.

    A section that has them already is left as it is: a finished run is judged where the checkpoint may not be. A size
    given in both places must be the same (E032), since one of the two would be ignored. `layers` may be fewer than the
    checkpoint's MoE layers where only its blocks are used; the first ones are.
    """
    section = document.data.get("model")
    if not isinstance(section, dict) or not isinstance(section.get("hf"), str):
        return
    section.setdefault("part", "whole")
    if section["part"] == "whole":
        _generate(document)
    if all(key in section for key in ("layers", *_SIZES)):
        return
    found = architecture.read(Path(section["hf"]))
    read: dict[str, Any] = {key: getattr(found, key) for key in _SIZES} | {"routing": dict(found.routing)}
    for key, value in read.items():
        _require_same(document, key, section.setdefault(key, value), value)
    available = len(found.moe_layers)
    layers = section.setdefault("layers", available)
    # A number that is none, or a part that there is not, is for the scenario's own checks to tell.
    if section["part"] == "whole" or (type(layers) is int and layers > available):
        _require_same(document, "layers", layers, available)
    section.setdefault("dtype", found.dtype if found.dtype in ("float32", "bfloat16") else "float32")


def _generate(document: Document) -> None:
    """A whole model chooses its own experts and generates, unless the scenario says otherwise."""
    workload = document.data.setdefault("workload", {})
    if isinstance(workload, dict):
        workload.setdefault("kind", "model")
        workload.setdefault("steps", "generate")


def _require_same(document: Document, key: str, given: Any, read: Any) -> None:
    if given != read:
        raise ScenarioError(
            "E032", f"model.{key} is not that of the checkpoint", why=f"{given} here, {read} in config.json",
            hint=f"remove {key!r}: it is read from config.json", where=document.where(("model", key)),
        )  # fmt: skip
