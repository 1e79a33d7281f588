"""What a GPU refuses is said with the reason and a way out."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.device.cuda import CudaDevice


def test_a_gpu_that_is_full_names_the_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the manual")

    monkeypatch.setattr(torch.cuda, "set_device", full)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    with pytest.raises(BalancerError) as raised:
        CudaDevice(NullSink(), index=1)
    assert raised.value.code == "E216"
    assert "GPU 1" in str(raised.value)
    assert "CUDA error: out of memory\n" in str(raised.value)
    assert "the manual" not in str(raised.value)
    assert "CUDA_DEVICE_MAX_CONNECTIONS=8 (now 32)" in str(raised.value)
