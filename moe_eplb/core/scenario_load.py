"""Scenarios from and to YAML. All problems of a file are reported at once, each with its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_eplb.core import architecture_file, balancer_file, recorded, scenario_overrides, scenario_problems, yaml_source
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario_model import Scenario

__all__ = ["dump", "json_schema", "load", "loads"]


def load(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Scenario:
    """The scenario of a file; a recorded file that it names is found beside it and checked to suffice.

    Args:
        path: The scenario's file.
        overrides: Changes such as ``model.layers=2``.
        check_files: False leaves the recorded file alone, as the judge of a finished run needs it no more.

    Raises:
        ScenarioError: E020 to E025 the text, E030 unknown keys, E031 bad values, E032 values that do not fit together,
            E033 overrides, E035 and E036 thresholds, E040 to E042 the recorded file it names, E043 to E045 the
            configuration of the model it names.
    """
    path = Path(path)
    scenario = loads(yaml_source.read_text(path), str(path), overrides)
    if check_files:
        recorded.check(scenario)
    return scenario


def loads(text: str, name: str, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario of a text. `name` is its file's path, for places and for the files it names; these are not read,
    except a balancer file and a model's configuration, whose content becomes part of the scenario."""
    document = scenario_overrides.apply(yaml_source.load(text, name), overrides)
    if not isinstance(document.data, dict):
        raise ScenarioError("E025", "a scenario is a mapping of keys to values", where=name)
    document.data.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "_", Path(name).stem)[:100])
    _make_absolute(document.data, Path(name).parent)
    balancer_file.merge(document)
    architecture_file.merge(document)
    try:
        return Scenario.model_validate(document.data)
    except ValidationError as error:
        raise scenario_problems.to_error(scenario_problems.from_validation(error, Scenario), document) from error


def dump(scenario: Scenario) -> str:
    """YAML text of everything in a scenario, defaults included, so that it means the same to a later version."""
    return yaml_source.dump(scenario.model_dump(exclude_none=True))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a scenario file, for editors; what must hold between values is beyond it."""
    schema = Scenario.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _make_absolute(data: dict[Any, Any], folder: Path) -> None:
    for section, key in (("workload", "path"), ("balancer", "config"), ("model", "hf")):
        inner = data.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str) and inner[key]:
            inner[key] = str((folder / inner[key]).absolute())
