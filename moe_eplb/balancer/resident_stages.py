"""When a layer whose state lives on the device is taken over and handed over.

Its own stages are enqueued when they are joined, behind what the model does beside them, though they wait only for what
came before their begin: of the nodes of a graph that wait for the same one, the first to be captured goes on in its
queue, and others begin in another up to some microseconds later. That shall not be the model's.
"""

from __future__ import annotations

from moe_eplb.balancer.layer_stream import LayerStream
from moe_eplb.balancer.resident_plans import ResidentPlans
from moe_eplb.core.events import Kind
from moe_eplb.device import control

__all__ = ["ResidentStages"]


class ResidentStages(ResidentPlans):
    """The part of `ResidentLayer` that takes layers over and hands them over, the latter beside the combine.

    The first layer of an iteration is taken over beside its top-k. Another one beside the experts of the layer before,
    where both have one queue, and where no exception discards what is enqueued: else one rank might have committed
    what another forgets. All that a take-over needs is the vote, for what read the layer's tables in the last iteration
    has ended before the layer's own hand-over then.
    """

    _following: ResidentStages
    """The layer that runs next, the first behind the last."""
    _taken: LayerStream | None = None
    """The queue of the layer before, from when that has taken this one over until this one is read."""

    def _begin_wait(self) -> None:
        ours = self._our_stream
        if ours is None:
            super()._begin_wait()
        else:
            ours.follow()  # no later work of this stream is waited for; and a capture may begin here

    def _end_wait(self) -> None:
        """Where the current stream has joined the end of the layer before, it has joined this one's take-over too."""
        ours, taken, self._taken = self._our_stream, self._taken, None
        if ours is None:
            return super()._end_wait()
        if taken is None:
            ours.submit_next(Kind.START_WAIT_GPU_STAGE, self._take_over)
        ours.mark()
        ours.begin_reading(joined=taken is not None and taken.joined_by is self._device.current)

    def _begin_hand_over(self) -> None:
        """Behind the take-over of the layer that runs next, unless that has begun: repeats of layers may take turns."""
        following, ours = self._following, self._our_stream
        if ours is None:
            return super()._begin_hand_over()
        comes = self._owner.layers_begun <= following.layer_idx  # not so behind the last layer
        if comes and not self._device.immediate:
            following._take_over_behind(ours)
        ours.end_reading()
        ours.follow()

    def _end_hand_over(self) -> None:
        ours = self._our_stream
        if ours is not None:
            ours.submit_next(Kind.START_SET_CPU_STAGE, self._hand_over)
            ours.mark()
        super()._end_hand_over()

    def _take_over_behind(self, before: LayerStream) -> None:
        ours = self._our_stream
        if ours is not None and ours.shares(before):
            ours.submit_next(Kind.START_WAIT_GPU_STAGE, self._take_over)
            before.joined_by = None  # who has joined before has not joined this
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
