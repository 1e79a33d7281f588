"""A stack of MoE blocks whose forwards are captured into graphs and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from moe_eplb.balancer import MoeLoadBalancer
from moe_eplb.core.evidence import EvidenceWriter
from moe_eplb.device import Device
from moe_eplb.device.captured import Captured
from moe_eplb.models import MoeBlock
from moe_eplb.session.master import Master
from moe_eplb.session.stack import Inputs, MoeStack

__all__ = ["GraphedStack"]


class GraphedStack:
    """Runs the first forward of each size as it is, which compiles and allocates; later ones replay a graph of it.

    Args:
        stack: Whose forwards.
        device: Where it runs.
        balancer: The stack's, or None.
    """

    def __init__(self, stack: MoeStack, device: Device, balancer: MoeLoadBalancer | None) -> None:
        self._stack, self._device, self._balancer = stack, device, balancer
        self._graphs: dict[tuple[int, ...], _Graph | None] = {}

    @property
    def blocks(self) -> Sequence[MoeBlock]:
        """See `Model`."""
        return self._stack.blocks

    @property
    def masters(self) -> Sequence[Master]:
        """See `Model`."""
        return self._stack.masters

    def prefetch(self, iterations: Iterable[int]) -> None:
        """See `Model`."""
        self._stack.prefetch(iterations)

    def load(self, iteration: int) -> Callable[[], Tensor]:
        """See `Model`. Here, between two iterations, graphs are captured."""
        inputs = self._stack.inputs(iteration)
        if inputs.tokens not in self._graphs:
            self._graphs[inputs.tokens] = None
            return partial(self._stack.forward, inputs)
        graph = self._graphs[inputs.tokens]
        if graph is None:
            with self._balancer.capturing() if self._balancer is not None else contextlib.nullcontext():
                graph = self._graphs[inputs.tokens] = _Graph(self._stack, self._device, inputs)
        graph.fill(inputs)
        return partial(self._replay, graph)

    def finish(self, evidence: EvidenceWriter) -> None:
        """See `Model`."""
        self._stack.finish(evidence)

    def _replay(self, graph: _Graph) -> Tensor:
        with self._balancer.replaying() if self._balancer is not None else contextlib.nullcontext():
            return graph.work.replay()


class _Graph:
    """A captured forward and the memory that it reads its inputs from."""

    def __init__(self, stack: MoeStack, device: Device, inputs: Inputs) -> None:
        self._inputs = inputs
        self.work: Captured[Tensor] = device.capture(partial(stack.forward, inputs))

    def fill(self, inputs: Inputs) -> None:
        """Give the next replay its inputs. Hidden states that inputs share may be the graph's own by then."""
        self._inputs.x.copy_(inputs.x)
        for place, ids in self._inputs.ids.items():
            ids.copy_(inputs.ids[place])
