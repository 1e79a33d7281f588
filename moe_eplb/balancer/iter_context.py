"""One iteration of a model under a balancer, and how a model gets a balancer or a reason why not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from moe_eplb.balancer.load_balancer import MoeLoadBalancer
from moe_eplb.core.config import LoadBalancerConfig
from moe_eplb.core.errors import BalancerError

__all__ = ["BalancerOff", "MoeLoadBalancerIterContext", "maybe_create_moe_load_balancer"]

_LOG = logging.getLogger(__name__)

SUPPORTED_ARCHITECTURES = frozenset(
    {"DeepseekV3ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"}
)


class MoeLoadBalancerIterContext:
    """Starts an iteration on entry and ends it on exit; an exception inside aborts it, so that the next starts clean.

    Does nothing without a balancer. Static routing has no iterations; there it only cleans up after an exception.

    Args:
        balancer: The model's balancer or None.
        enable_statistic, enable_updates: See `MoeLoadBalancer.set_iter_info`.
    """

    def __init__(
        self,
        balancer: MoeLoadBalancer | None,
        enable_statistic: bool | None = None,
        enable_updates: bool | None = None,
    ) -> None:
        self._balancer = balancer
        self._dynamic = balancer is not None and balancer.is_dynamic_routing()
        self._info = (enable_statistic, enable_updates)

    def __enter__(self) -> MoeLoadBalancerIterContext:
        if self._balancer is not None and self._dynamic:
            self._balancer.set_iter_info(*self._info)
            self._balancer.start_iter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._balancer is None:
            return
        if not self._dynamic:
            if error is not None:
                self._balancer.abort_layers()
            return
        if error is not None:
            self._balancer.abort_iter()
            return
        try:
            self._balancer.end_iter()
        except Exception:
            self._balancer.abort_iter()
            raise


class ModelConfig(Protocol):
    """What `maybe_create_moe_load_balancer` reads of a model's configuration."""

    architecture: str
    moe_load_balancer: LoadBalancerConfig | None


class Mapping(Protocol):
    """What `maybe_create_moe_load_balancer` reads of a parallel mapping."""

    moe_ep_rank: int
    moe_ep_size: int


@dataclass(frozen=True, slots=True)
class BalancerOff(contextlib.AbstractContextManager[None]):
    """Stands where a balancer would, and says why there is none."""

    reason: str

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def maybe_create_moe_load_balancer(
    model_config: ModelConfig, mapping: Mapping, make: Callable[[LoadBalancerConfig], MoeLoadBalancer]
) -> MoeLoadBalancer | BalancerOff:
    """A balancer made by `make`, or `BalancerOff` with the reason, which is logged too.

    A balancer whose placements never change comes with a line in the log that says so.

    Raises:
        BalancerError: E156, E157 when the configuration does not fit the number of ranks.
    """
    config = model_config.moe_load_balancer
    reason = ""
    if config is None:
        reason = "no load balancer is configured"
    elif mapping.moe_ep_size <= 1:
        reason = "one rank has nothing to balance"
    elif model_config.architecture not in SUPPORTED_ARCHITECTURES:
        reason = (
            f"architecture {model_config.architecture} is not supported ({', '.join(sorted(SUPPORTED_ARCHITECTURES))})"
        )
    if reason or config is None:
        _LOG.warning("balancer: off, because %s", reason)
        return BalancerOff(reason)
    _require_ranks(config, mapping)
    balancer = make(config)
    if balancer.is_static_routing():
        _LOG.warning("balancer: off, because layer_updates_per_iter is 0 (static routing): the first placement stays")
    return balancer


def _require_ranks(config: LoadBalancerConfig, mapping: Mapping) -> None:
    """Raise BalancerError when the configuration was made for another number of ranks."""
    size = mapping.moe_ep_size
    if config.ep_size not in (None, size):
        raise BalancerError(
            "E156", "the load balancer's configuration is made for another number of ranks",
            why=f"ep_size {config.ep_size} in it, moe_ep_size {size} in the mapping",
            hint="generate it for these ranks",
        )  # fmt: skip
    if config.num_slots % size:
        raise BalancerError(
            "E157", "the slots do not spread evenly over the ranks", why=f"{config.num_slots} slots, {size} ranks",
            hint=f"use {-(-config.num_slots // size) * size} slots",
        )  # fmt: skip
