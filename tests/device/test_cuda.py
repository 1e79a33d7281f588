"""What a GPU refuses is said with the reason and a way out."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import STREAMS, Kind, NullSink
from moe_eplb.device import cuda
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.device.environment import GRAPH_MIXING


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


class Queue:
    """A stream that writes down when the host waits for it."""

    def __init__(self, told: list[str]) -> None:
        self.synchronize = partial(told.append, "waited")


@pytest.mark.parametrize(("mixing", "waits"), [("0", True), ("1", False), (None, False)])
def test_what_is_not_replayed_waits_for_replays_only_where_nccl_asks_for_it(
    mixing: str | None, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.delenv(GRAPH_MIXING, raising=False)
    if mixing is not None:
        monkeypatch.setenv(GRAPH_MIXING, mixing)
    monkeypatch.setattr(cuda, "_take", lambda _device: None)
    monkeypatch.setattr(cuda, "attach", lambda: None)
    monkeypatch.setattr(cuda, "_new_stream", lambda *_: Queue(told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Queue(told))
    times = SimpleNamespace(launch=lambda fn, *_: fn(), replayed=lambda *_: None, tell=lambda: None)
    monkeypatch.setattr(cuda, "CudaTimes", lambda _sink: times)
    device = CudaDevice(NullSink())
    graph: Any = SimpleNamespace(looks=[])

    def work() -> None:
        device.run(Kind.DISPATCH, 0, lambda: told.append("ran"))

    work()
    device.replayed(graph)
    device.replayed(graph)
    work()
    work()
    assert told == ["ran", *["waited"] * waits, "ran", "ran"]
    device.replayed(graph)
    device.synchronize()
    told.clear()
    work()
    assert told == ["ran"], "no replay is under way"


def test_the_balancers_streams_go_before_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_new_stream", lambda device, priority=0: priority)
    device: Any = SimpleNamespace(torch_device=None, _serial=False, _streams=[])
    made = {name: CudaDevice._make_stream(device, name, index) for index, name in enumerate(STREAMS) if index}
    priorities = {name: stream.queue for name, stream in made.items()}  # type: ignore[attr-defined]
    balancers = {priorities.pop(name) for name in ("MoeBalancer", "MoeBalancerStatistic")}
    assert max(balancers) < min(priorities.values())
