"""Moving weights: slots of this rank, staged copies of what comes next, and the write into the slots.

Staging keeps the promise that weights and tables of a layer change together or not at all: a plan that the ranks do not
agree on has touched nothing, and a commit only copies within this rank's own memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moe_eplb.balancer.host_weights import HostMoeTensorSharer
from moe_eplb.core.errors import BalancerError

__all__ = ["SlotWeights", "StagedWeights"]


@dataclass(slots=True)
class StagedWeights:
    """New contents of some local slots: (local slot, weight name, tensor), and their size in bytes, also by source."""

    tensors: list[tuple[int, str, Tensor]] = field(default_factory=list)
    bytes: int = 0
    by_source: dict[str, int] = field(default_factory=dict)


class SlotWeights:
    """The tensors that the expert computation of one layer reads, by local slot and weight name."""

    def __init__(self, layer: int, slots: int) -> None:
        self._layer = layer
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(slots)]

    def register(self, local_slot: int, name: str, tensor: Tensor) -> None:
        """Tell that `tensor` (a view into what the kernel reads) is weight `name` of `local_slot`."""
        if not 0 <= local_slot < len(self._slots):
            raise BalancerError(
                "E135", f"layer {self._layer}: there is no local slot {local_slot}", why=f"it has {len(self._slots)}"
            )
        if name in self._slots[local_slot]:
            raise BalancerError("E136", f"layer {self._layer}: {name} of local slot {local_slot} was registered twice")
        self._slots[local_slot][name] = tensor

    def check(self, host: HostMoeTensorSharer | None) -> None:
        """Every slot has exactly the weights of which there is a host copy, of the same shapes and dtypes; without host
        copies, those of the first slot.
        """
        first = self._slots[0] if host is None else {name: host.host_tensor(0, name) for name in host.names}
        wanted, whose = _specs(first), "local slot 0" if host is None else "the host copy"
        for local_slot, weights in enumerate(self._slots):
            found = _specs(weights)
            if found != wanted:
                raise BalancerError(
                    "E137", f"layer {self._layer}: local slot {local_slot} and {whose} have different weights",
                    why=f"slot {found}, {whose} {wanted}",
                    hint="register every tensor that the kernel reads, scales included, and share each expert's",
                )  # fmt: skip

    def stage(self, changes: Iterable[tuple[int, int]], host: HostMoeTensorSharer) -> StagedWeights:
        """Copy from the host what the (local slot, new expert) pairs need."""
        staged = StagedWeights()
        for local_slot, expert in changes:
            for name in self._slots[local_slot]:
                copy = host.host_tensor(expert, name).clone()
                staged.tensors.append((local_slot, name, copy))
                staged.bytes += copy.numel() * copy.element_size()
        staged.by_source["host"] = staged.bytes
        return staged

    def write(self, staged: StagedWeights) -> None:
        """Overwrite the slots by what was staged."""
        for local_slot, name, tensor in staged.tensors:
            self._slots[local_slot][name].copy_(tensor)


def _specs(weights: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: _spec(weights[name]) for name in sorted(weights)}


def _spec(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
