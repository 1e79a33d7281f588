"""Device memory that other processes' GPUs read over NVLink or PCIe, by CUDA's inter-process handles."""

from __future__ import annotations

import ctypes
import os
from typing import cast

import torch
from torch import UntypedStorage

from moe_eplb.device.driver_calls import driver, require_success
from moe_eplb.device.sharing import Offer, Sharing, cannot_open

__all__ = ["SharedDeviceMemory"]

_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS."""


class _Handle(ctypes.Structure):
    """`CUipcMemHandle`."""

    _fields_ = [("reserved", ctypes.c_char * 64)]


class SharedDeviceMemory(Sharing):
    """Opens each allocation once; storages of torch's allocator lie somewhere within one.

    A handle is opened in the context of this rank's own GPU, which maps the other GPU's memory: a context there would
    take some hundred megabytes of it.

    Args:
        device: This rank's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._opened: dict[bytes, int] = {}

    def offer(self, storage: UntypedStorage) -> Offer:
        torch.cuda.synchronize(self._device)  # who opens it may read at once
        base, handle = ctypes.c_uint64(), _Handle()
        size = ctypes.c_size_t()
        address = storage.data_ptr()
        code = driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        require_success("cuMemGetAddressRange", code)
        code = driver().cuIpcGetMemHandle(ctypes.byref(handle), base)
        require_success("cuIpcGetMemHandle (torch's expandable segments cannot be shared)", code)
        return Offer(os.getpid(), bytes(handle), storage.nbytes(), address - base.value, self._card())

    def open(self, offer: Offer) -> UntypedStorage:
        base = self._opened.get(offer.where)
        if base is None:
            base = self._opened[offer.where] = self._map(offer)
        opened = torch._C._construct_storage_from_data_pointer(base + offer.offset, self._device, offer.size)
        return cast(UntypedStorage, opened)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        while self._opened:
            _, base = self._opened.popitem()
            require_success("cuIpcCloseMemHandle", driver().cuIpcCloseMemHandle(ctypes.c_uint64(base)))

    def _map(self, offer: Offer) -> int:
        torch.cuda.set_device(self._device)
        address = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(offer.where)
        code = driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), handle, ctypes.c_uint(_PEER_ACCESS))
        if code:
            raise cannot_open(
                offer, f"cuIpcOpenMemHandle gave CUresult {code} for memory of {offer.card} on {self._card()}"
            )
        return address.value

    def _card(self) -> str:
        properties = torch.cuda.get_device_properties(self._device)
        return f"{properties.name} {properties.uuid}"
