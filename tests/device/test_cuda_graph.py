"""A graph is on the device when its capture ends, over objects that write down what is asked of them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import cuda_graph
from moe_eplb.device.cuda_graph import CudaGraph

EXECUTABLE, STREAM = 7, 5


class Told:
    """Torch's capture and the driver's upload; `code` is what the driver answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.code = 0
        stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: self.calls.append("synchronise"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(raw_cuda_graph_exec=lambda: EXECUTABLE))
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
        monkeypatch.setattr(cuda_graph, "driver", lambda: SimpleNamespace(cuGraphUpload=self._upload))

    @contextlib.contextmanager
    def _graph(self, _graph: object, **_options: object) -> Iterator[None]:
        yield
        self.calls.append("captured")

    def _upload(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        self.calls.append(("upload", executable.value, stream.value))
        return self.code


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def _captured() -> CudaGraph[int]:
    device: Any = SimpleNamespace(torch_device="cuda:0", graph_pool=None)
    graph: CudaGraph[int] = CudaGraph(device, 0)
    graph.capture(lambda: 3)
    return graph


def test_a_captured_graph_is_uploaded_before_it_can_be_launched(told: Told) -> None:
    assert _captured().result == 3
    assert told.calls == ["captured", ("upload", EXECUTABLE, STREAM), "synchronise"]


def test_a_graph_that_cannot_be_uploaded_is_told(told: Told) -> None:
    told.code = 2
    with pytest.raises(BalancerError, match=r"E171.*cuGraphUpload"):
        _captured()
