"""Scripted calls of the balancer's API: what a `calls` scenario lists, and the error it may expect."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

__all__ = ["CallName", "CallStep", "ExpectError"]

CallName = Literal[
    "start_iter",
    "end_iter",
    "abort_iter",
    "register_layer",
    "start_wait_gpu_stage",
    "done_wait_gpu_stage",
    "update_local_statistic",
    "get_local_statistic_tensor",
    "update_statistic_with_gathered_statistic",
    "update_statistic_with_local_ids",
    "update_statistic_with_global_ids",
    "route",
    "start_set_cpu_stage",
    "done_set_cpu_stage",
]
_NAMES: tuple[str, ...] = get_args(CallName)


class CallStep(BaseModel):
    """One call. In YAML either its bare name or ``name: {arguments}``.

    `layer`, `first` (is_first_stage) and `last` (is_last_stage) belong to the stage calls, `allreduce` to
    ``update_statistic_with_local_ids`` (False: call it without a reduction).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    call: CallName
    layer: int = Field(default=0, ge=0, le=4095)
    first: bool = True
    last: bool = True
    allreduce: bool = True

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        name, arguments = _split(value)
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name), _NAMES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(_NAMES)}"
            raise PydanticCustomError("call_name", "{name} is no call", {"name": repr(name), "hint": hint})
        return {"call": name, **arguments}

    @model_serializer(mode="wrap")
    def _to_yaml(self, handler: SerializerFunctionWrapHandler) -> Any:
        defaults = type(self).model_fields
        given = {k: v for k, v in handler(self).items() if k != "call" and v != defaults[k].default}
        return {self.call: given} if given else self.call

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        inner = handler.resolve_ref_schema(handler(core_schema))
        arguments = {k: v for k, v in inner["properties"].items() if k != "call"}
        one = {"type": "object", "properties": arguments, "additionalProperties": False}
        named = {"type": "object", "properties": dict.fromkeys(_NAMES, one), "minProperties": 1, "maxProperties": 1}
        return {"anyOf": [{"enum": list(_NAMES)}, named | {"additionalProperties": False}]}


def _split(value: Any) -> tuple[Any, dict[Any, Any]]:
    if isinstance(value, str):
        return value, {}
    if isinstance(value, dict) and "call" in value:
        return value["call"], {k: v for k, v in value.items() if k != "call"}
    if isinstance(value, dict) and len(value) == 1:
        name, arguments = next(iter(value.items()))
        if arguments is None or isinstance(arguments, dict):
            return name, arguments or {}
    hint = "write its name, or 'name: {layer: 0, first: true, last: true}'"
    raise PydanticCustomError("call_form", "a call is a name or one name with its arguments", {"hint": hint})


class ExpectError(BaseModel):
    """The error that the calls must end in: its code, the index of the call that raises it, a part of its message."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    code: str = Field(pattern=r"^E\d{3}$")
    at: int | None = Field(default=None, ge=0)
    contains: str = ""
