"""Scenarios: the model, and reading and writing it as YAML."""

from __future__ import annotations

from moe_eplb.core.scenario_calls import CallStep, ExpectError
from moe_eplb.core.scenario_load import dump, json_schema, load, loads
from moe_eplb.core.scenario_model import Scenario
from moe_eplb.core.scenario_parts import Balancer, Checks, Model, Record, Routing, Workload

__all__ = [
    "Balancer",
    "CallStep",
    "Checks",
    "ExpectError",
    "Model",
    "Record",
    "Routing",
    "Scenario",
    "Workload",
    "dump",
    "json_schema",
    "load",
    "loads",
]
