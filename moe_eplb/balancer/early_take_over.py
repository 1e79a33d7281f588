"""When a layer whose state lives on the device is taken over: by the layer before it, which has time for that."""

from __future__ import annotations

from moe_eplb.balancer.layer_stream import LayerStream
from moe_eplb.balancer.resident_plans import ResidentPlans
from moe_eplb.core.events import Kind
from moe_eplb.device import control

__all__ = ["EarlyTakeOver"]


class EarlyTakeOver(ResidentPlans):
    """The part of `ResidentLayer` that takes layers over.

    The first layer of an iteration is taken over beside its top-k. Another one beside the experts of the layer before,
    where both have one queue, and where no exception discards what is enqueued: else one rank might have committed
    what another forgets. All that a take-over needs is the vote, for what read the layer's tables in the last iteration
    has ended before the layer's own hand-over then.
    """

    _following: EarlyTakeOver
    """The layer that runs next, the first behind the last."""
    _taken: LayerStream | None = None
    """The queue of the layer before, from when that has taken this one over until this one is read."""

    def _begin_wait(self) -> None:
        ours = self._our_stream
        if ours is None or self._taken is None:
            super()._begin_wait()
        else:
            ours.follow()  # as it must where a capture begins here
            ours.mark()

    def _end_wait(self) -> None:
        """Where the current stream has joined the end of the layer before, it has joined this one's take-over too."""
        taken, self._taken = self._taken, None
        ours = self._our_stream
        if ours is not None and taken is not None and taken.joined_by is self._device.current:
            ours.begin_reading(joined=True)
        else:
            super()._end_wait()

    def _submit_hand_over(self) -> None:
        """Behind the take-over of the layer that runs next, unless that has begun: repeats of layers may take turns."""
        following, stream = self._following, self._our_stream
        comes = self._owner.layers_begun <= following.layer_idx  # not so behind the last layer
        if stream is not None and comes and not self._device.immediate:
            following._take_over_behind(stream)
        super()._submit_hand_over()

    def _take_over_behind(self, before: LayerStream) -> None:
        ours = self._our_stream
        if ours is not None and ours.shares(before):
            ours.submit_next(Kind.START_WAIT_GPU_STAGE, self._take_over)
            self._taken = before

    def _take_over(self) -> None:
        control.take_over(self.resident.model, self.state)
        if self._device.immediate:
            self._owner.collect_layer(self.layer_idx)

    @property
    def _is_last(self) -> bool:
        return self._following.layer_idx <= self.layer_idx

    @property
    def _our_stream(self) -> LayerStream | None:
        """None in the older choreography, which neither counts in the route nor holds anything."""
        return self._stream if isinstance(self._stream, LayerStream) else None

    def restart(self) -> None:
        """See the base class."""
        super().restart()
        self._taken = None
