"""What a GPU refuses is said with the reason and a way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import STREAMS, NullSink
from moe_eplb.device import cuda
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


def test_the_balancers_streams_go_before_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_new_stream", lambda device, priority=0: priority)
    device: Any = SimpleNamespace(torch_device=None, _serial=False, _streams=[])
    made = {name: CudaDevice._make_stream(device, name, index) for index, name in enumerate(STREAMS) if index}
    priorities = {name: stream.queue for name, stream in made.items()}  # type: ignore[attr-defined]
    balancers = {priorities.pop(name) for name in ("MoeBalancer", "MoeBalancerStatistic")}
    assert max(balancers) < min(priorities.values())
