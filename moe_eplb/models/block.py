"""A model's MoE block: router, routed experts and, where the family has one, the shared expert beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.models.shared_expert import SharedExpert, SharedStream
from moe_eplb.moe import FusedMoE, GroupedMoE, WideEPMoE
from moe_eplb.moe.wide_ep_setup import required_stream

__all__ = ["MoeBlock"]


class MoeBlock(nn.Module):
    """What stands in a decoder layer where a dense model has its feed-forward.

    Args:
        router: Weight [E, D] of the router.
        moe: The routed experts.
        shared: The shared expert or None.
        aux_stream_dict: Model-wide auxiliary streams; with a shared expert it needs MoeShared.
        router_dtype: What the router computes in; the hidden states' dtype if None.

    Raises:
        BalancerError: E140 when there is a shared expert and no MoeShared stream.
    """

    def __init__(
        self,
        router: Tensor,
        moe: WideEPMoE | GroupedMoE | FusedMoE,
        device: Device,
        *,
        shared: SharedExpert | None = None,
        aux_stream_dict: Mapping[AuxStreamType, Stream] | None = None,
        router_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.router = nn.Parameter(router, requires_grad=False)
        self.router_dtype = router_dtype
        self.moe = moe
        self.shared = shared
        self._shared_stream: SharedStream | None = None
        if shared is not None:
            streams = aux_stream_dict or {AuxStreamType.MoeShared: device.stream(AuxStreamType.MoeShared)}
            stream = required_stream(streams, AuxStreamType.MoeShared, "the shared expert runs beside the routed ones")
            self._shared_stream = SharedStream(device, stream, moe.layer_idx)

    def load_weights(self, expert_weights: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Fill the routed experts' slots, see `WideEPMoE.load_weights`."""
        self.moe.load_weights(expert_weights)

    def router_logits(self, x: Tensor) -> Tensor:
        """[T, E] for hidden states [T, D]."""
        dtype = self.router_dtype or x.dtype
        logits: Tensor = nn.functional.linear(x.to(dtype), self.router.to(dtype))
        return logits

    def forward(self, hidden: Tensor, all_rank_num_tokens: Sequence[int] | None = None) -> Tensor:
        """Output of the shape of `hidden` [..., D]; the leading dimensions together are this rank's T tokens.

        Args:
            hidden: Hidden states.
            all_rank_num_tokens: See `WideEPMoE.forward`.
        """
        x = hidden.reshape(-1, hidden.shape[-1])
        join = self._start_shared(x)
        y: Tensor = self.moe(x, self.router_logits(x), all_rank_num_tokens)
        if join is not None:
            y = y + join()
            if self.moe.probe is not None:
                self.moe.device.observe(partial(self.moe.probe.block_output, self.moe.layer_idx, x, y))
        return y.view(hidden.shape)

    def _start_shared(self, x: Tensor) -> Callable[[], Tensor] | None:
        if self.shared is None or self._shared_stream is None:
            return None
        return self._shared_stream.start(partial(self._run_shared, self.shared), x)

    def _run_shared(self, shared: SharedExpert, x: Tensor) -> Tensor:
        y: Tensor = shared(x)
        if self.moe.probe is not None:
            self.moe.device.observe(partial(self.moe.probe.shared_output, self.moe.layer_idx, x, y))
        return y
