"""Copies that give way, on one GPU: they wait for a busy link, and for none for long."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from moe_eplb.core.events import NullSink

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(120)]

SIZE = 24 << 20
UNTIL = 5


class World:
    """Copies of some parts, made by a thread as the updater makes them."""

    def __init__(self) -> None:
        from moe_eplb.device.cuda import CudaDevice

        self.device: Any = CudaDevice(NullSink())
        self.begun = self.device.host_visible((1,), torch.int64)
        self.copier = self.device.new_copier(self.begun)
        place = self.device.torch_device
        self.source = torch.randint(0, 255, (SIZE,), dtype=torch.uint8, device=place)
        self.target = torch.zeros(SIZE, dtype=torch.uint8, device=place)
        self.copy()  # whatever is compiled or loaded at first use is there from here on
        self.target.zero_()
        torch.cuda.synchronize()

    def copy(self) -> float:
        """Seconds that it took."""
        begun = time.perf_counter()
        assert self.copier.give_way([(self.target, self.source)], UNTIL)
        return time.perf_counter() - begun

    @property
    def same(self) -> bool:
        return torch.equal(self.source, self.target)


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("begun", [0, UNTIL])
def test_a_free_link_holds_nobody_up(world: World, begun: int) -> None:
    world.begun.fill_(begun)
    assert min(world.copy() for _ in range(5)) < 0.02
    assert world.same


def test_what_is_urgent_passes_a_busy_link(world: World) -> None:
    world.device.link.fill_(1)
    torch.cuda.synchronize()
    world.begun.fill_(UNTIL)
    assert min(world.copy() for _ in range(5)) < 0.02
    assert world.same
    assert int(world.device.link) == 1


def test_copies_wait_until_the_link_is_free(world: World) -> None:
    world.device.link.fill_(1)
    torch.cuda.synchronize()
    took = list[float]()
    thread = threading.Thread(target=lambda: took.append(world.copy()))
    thread.start()
    time.sleep(0.02)
    assert not took
    world.device.link.zero_()
    thread.join(10)
    assert 0.015 < took[0] < 0.048, "it was freed by who kept it, and not by the copies"
    assert world.same


def test_a_link_that_nobody_frees_holds_copies_up_for_a_bounded_time(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.device.link.fill_(1)
    torch.cuda.synchronize()
    assert 0.04 < world.copy() < 1.0
    assert world.same
    assert int(world.device.link) == 0
    assert f"copies of {SIZE} bytes waited 0.05 s" in caplog.text
