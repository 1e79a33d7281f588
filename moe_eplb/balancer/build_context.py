"""Which balancer a model that is being built takes part in, and the functions by which it does.

Public names and their meaning follow TensorRT-LLM's ``moe_load_balancer.py``.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from moe_eplb.device import Stream

if TYPE_CHECKING:
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer
    from moe_eplb.balancer.single_layer import SingleLayerMoeLoadBalancer

__all__ = [
    "BuildContext",
    "get_moe_load_balancer",
    "moe_load_balancer_add_single_layer",
    "moe_load_balancer_set_repeated_for_next_layer",
]

_CURRENT = threading.local()


class BuildContext:
    """Inside such a block, which may lie within another, models built on this thread find the balancer."""

    def __init__(self) -> None:
        self._previous: list[MoeLoadBalancer | None] = []

    def __enter__(self) -> Self:
        self._previous.append(get_moe_load_balancer())
        _CURRENT.balancer = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        previous = self._previous.pop()
        if previous is None:
            del _CURRENT.balancer
        else:
            _CURRENT.balancer = previous


def get_moe_load_balancer() -> MoeLoadBalancer | None:
    """The balancer in whose context this thread builds a model."""
    return cast("MoeLoadBalancer | None", getattr(_CURRENT, "balancer", None))


def moe_load_balancer_add_single_layer(
    expert_count: int, top_k: int, slots_per_rank: int, aux_stream: Stream | None = None
) -> SingleLayerMoeLoadBalancer | None:
    """Add a layer to the current balancer; None without one."""
    balancer = get_moe_load_balancer()
    return balancer.add_layer(expert_count, top_k, slots_per_rank, aux_stream) if balancer else None


def moe_load_balancer_set_repeated_for_next_layer(count: int) -> None:
    """See `MoeLoadBalancer.set_repeated_for_next_layer`; nothing without a current balancer."""
    balancer = get_moe_load_balancer()
    if balancer:
        balancer.set_repeated_for_next_layer(count)
