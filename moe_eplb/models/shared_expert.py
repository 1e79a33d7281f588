"""The expert that every token uses beside its routed ones, on a stream of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_eplb.core.events import Kind
from moe_eplb.device import Device, EventType, Stream

__all__ = ["SharedExpert", "SharedStream"]


class SharedExpert(nn.Module):
    """A SwiGLU feed-forward over all tokens, scaled by a sigmoid gate where the model has one (Qwen2-MoE).

    Args:
        w3_w1: [2I, D], the rows of w3 (up) before those of w1 (gate projection).
        w2: [D, I].
        gate: [1, D] or None.
    """

    def __init__(self, w3_w1: Tensor, w2: Tensor, gate: Tensor | None = None) -> None:
        super().__init__()
        self.w3_w1 = nn.Parameter(w3_w1, requires_grad=False)
        self.w2 = nn.Parameter(w2, requires_grad=False)
        self.gate = None if gate is None else nn.Parameter(gate, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Output [T, D] for hidden states [T, D]."""
        up, gated = nn.functional.linear(x, self.w3_w1).chunk(2, dim=-1)
        y = nn.functional.linear(nn.functional.silu(gated) * up, self.w2)
        return y if self.gate is None else torch.sigmoid(nn.functional.linear(x, self.gate)) * y


class SharedStream:
    """Runs a layer's shared expert on the MoeShared stream while the current stream does the routed ones.

    Args:
        device: Where the work runs.
        stream: The MoeShared stream; a model may share it with Attention.
        layer: Index of the layer, for records.
    """

    def __init__(self, device: Device, stream: Stream, layer: int) -> None:
        self._device, self._stream, self._layer = device, stream, layer
        self._begin = device.new_event(EventType.Main.name)
        self._end = device.new_event(EventType.MoeShared.name)

    def start(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        """Begin `work(x)` after what the current stream has submitted; call the result to join it and get its value."""
        device, result = self._device, list[Tensor]()
        device.record(self._begin, device.current)
        device.wait(self._stream, self._begin)
        device.submit(
            self._stream, Kind.SHARED_EXPERT, self._layer, lambda: result.append(work(x)), a=x.shape[0]
        )  # fmt: skip
        device.record(self._end, self._stream)

        def join() -> Tensor:
            device.wait(device.current, self._end)
            return result.pop()

        return join
