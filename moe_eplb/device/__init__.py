"""Streams, events and the devices behind them. Only this package may call a vendor's API."""

from __future__ import annotations

from moe_eplb.core.errors import UsageError
from moe_eplb.core.events import EventSink
from moe_eplb.device.base import Device, Event, Stream
from moe_eplb.device.cpu import CpuDevice
from moe_eplb.device.streams import AuxStreamType, EventType

__all__ = ["AuxStreamType", "CpuDevice", "Device", "Event", "EventType", "Stream", "get_device", "require_devices"]


def require_devices(kind: str, ranks: int, *, shared: bool = False) -> None:
    """Raise UsageError E010 unless this machine has a device of that kind for each of its ranks, or one if `shared`."""
    if kind != "cuda":
        return
    import torch

    found = torch.cuda.device_count()
    if found < (1 if shared else ranks):
        raise UsageError(
            "E010", f"{ranks} ranks need {ranks} GPUs, one each",
            why=f"{found} are visible to torch {torch.__version__}",
            hint="use --ranks with fewer, share_gpus: true, or --device cpu; CUDA_VISIBLE_DEVICES may hide some",
        )  # fmt: skip


def get_device(
    kind: str, sink: EventSink, *, seed: int | None = None, rank: int = 0, check_order: bool = False
) -> Device:
    """The device called `kind`; ranks beyond the number of GPUs take turns with them.

    `seed` (common to all ranks) reorders auxiliary work where the backend can. Without a seed nothing overlaps.

    `check_order`: see `CpuDevice`.
    """
    if kind == "cuda":
        import torch

        from moe_eplb.device.cuda import CudaDevice

        return CudaDevice(sink, index=rank % torch.cuda.device_count(), check_order=check_order, serial=seed is None)
    if kind != "cpu":
        raise UsageError("E010", f"there is no device {kind!r}", why="available: cpu, cuda", hint="use device: cpu")
    return CpuDevice(sink, seed=seed, rank=rank, check_order=check_order)
