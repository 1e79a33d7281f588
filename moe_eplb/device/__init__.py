"""Streams, events and the devices behind them. Only this package may call a vendor's API."""

from __future__ import annotations

from moe_eplb.core.errors import UsageError
from moe_eplb.core.events import EventSink
from moe_eplb.device.base import Device, Event, Stream
from moe_eplb.device.cpu import CpuDevice
from moe_eplb.device.streams import AuxStreamType, EventType

__all__ = ["AuxStreamType", "CpuDevice", "Device", "Event", "EventType", "Stream", "get_device"]


def get_device(
    kind: str, sink: EventSink, *, seed: int | None = None, rank: int = 0, check_order: bool = False
) -> Device:
    """The device called `kind`; `seed` (common to all ranks) reorders auxiliary work where the backend can.

    `check_order`: see `CpuDevice`.
    """
    if kind == "cuda":
        from moe_eplb.device.cuda import CudaDevice

        return CudaDevice(sink, index=rank, check_order=check_order)
    if kind != "cpu":
        raise UsageError("E010", f"there is no device {kind!r}", why="available: cpu, cuda", hint="use device: cpu")
    return CpuDevice(sink, seed=seed, rank=rank, check_order=check_order)
