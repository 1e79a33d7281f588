"""What a GPU refuses is said with the reason and a way out."""

from __future__ import annotations

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import NullSink
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.device.streams import AuxStreamType


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_balancers_streams_go_before_the_models() -> None:
    device = CudaDevice(NullSink())
    balancers = device.stream(AuxStreamType.MoeBalancer), device.statistic_stream
    others = device.main, device.stream(AuxStreamType.MoeShared)
    priorities = [[stream.queue.priority for stream in kind] for kind in (balancers, others)]  # type: ignore[attr-defined]
    assert max(priorities[0]) < min(priorities[1])
