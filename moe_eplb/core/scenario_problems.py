"""From validation errors to one error that lists every problem with its place in the file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.problem import Problem
from moe_eplb.core.yaml_source import Document, Loc

__all__ = ["from_validation", "to_error"]

_TAGS = ("list", "number")  # steps that validation adds where a value may have either form


def from_validation(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem that a failed validation of `model` found."""
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "fits_together":
            found += detail["ctx"]["problems"]
        else:
            found.append(_problem(detail, model))
    return found


def to_error(problems: Sequence[Problem], document: Document) -> ScenarioError:
    """One error of at least one problem. Its code and place are those of the first problem in the list."""
    first = problems[0]
    places = [document.where(p.loc, key=p.code == "E030") for p in problems]
    if len(problems) == 1:
        return ScenarioError(first.code, first.what, hint=first.hint, where=places[0])
    lines = [
        f"{place}: {p.what}" + (f" ({p.hint})" if p.hint else "") for place, p in zip(places, problems, strict=True)
    ]
    return ScenarioError(first.code, f"{len(problems)} problems", why="\n       ".join(lines), where=document.name)


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> Problem:
    kind = detail["type"]
    loc = detail["loc"] if kind == "extra_forbidden" else tuple(step for step in detail["loc"] if step not in _TAGS)
    name = ".".join(str(step) for step in loc) or "the file"
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    if kind == "extra_forbidden":
        return Problem(loc, f"unknown key {name!r}", _nearest(str(loc[-1]), _field_names(model, loc[:-1])), "E030")
    if kind == "missing":
        return Problem(loc[:-1], f"{name!r} is missing", code="E031")
    message = detail["msg"].removeprefix("Input ")
    if kind == "literal_error":
        expected = detail["ctx"]["expected"]
        names = [part.strip("' ") for part in expected.replace(" or ", ",").split(",")]
        return Problem(loc, f"{name}: must be {expected}, not {given}", _nearest(detail["input"], names), "E031")
    hint = detail.get("ctx", {}).get("hint", "")
    return Problem(loc, f"{name}: {message}, not {given}" if not hint else f"{name}: {message}", hint, "E031")


def _nearest(given: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(given), names, 1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(names)}" if names else ""


def _field_names(model: type[BaseModel], loc: Loc) -> list[str]:
    """Names that the section at `loc` knows; steps that are indices or keys of a mapping stay in their section."""
    for step in loc:
        field = model.model_fields.get(str(step))
        inner = _models_in(field.annotation) if field is not None else []
        model = inner[0] if inner else model
    return [name for name in model.model_fields if name != "call"]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
