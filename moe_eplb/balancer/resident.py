"""The balancer whose state lives on the device, so that iterations run without a look by the host, in graphs too.

The host writes a row for each iteration (what it counts, which layers hand over), the device does the rest: it counts,
votes, commits and hands loads over by itself. The updater's thread plans, copies weights into free cells and publishes
tables; a plan is taken by the device when all ranks have it. The host reads afterwards what happened.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence

from moe_eplb.balancer.updater import Update
from moe_eplb.core.errors import BalancerError
from moe_eplb.device import Device
from moe_eplb.device.bell import CpuBell
from moe_eplb.device.control import LayerStack, ModelState

__all__ = ["Resident"]

_IN_ORDER = ("x86_64", "amd64")
"""Processors whose stores others see in their order. Elsewhere the first layer reads the row, launched behind it."""


class Resident:
    """What the layers of one model share.

    Args:
        device: Where the model runs.
        layers: L.
        run_ahead: How many iterations the host may be ahead of the device. A queue of launches that is full could
            otherwise hold the very copies that the device waits for.
        timeout_s: The longest that the device waits for a plan.
        awake: Whether the updater's thread may use a core while it waits.

    Attributes:
        run_ahead_waits: How often the host was too far ahead and waited.
        plan_waits: How often it waited for the updater to have enqueued a plan.
        expected: How often the bell will have been rung when all that is enqueued is done.
        stack: The layers' states together, where one reduction an iteration sums them all.
        looks_ahead: Whether the device may look for a row while the host writes it.
    """

    def __init__(self, device: Device, layers: int, *, run_ahead: int, timeout_s: float, awake: bool = False) -> None:
        self.model = ModelState.make(layers, device.torch_device, device.host_visible, run_ahead + 2)
        # Seen and written through numpy, since an operation of torch takes several times as long.
        self._turns, self._begun = self.model.turns.numpy(), self.model.begun.numpy()
        self._overflow, self._reports = self.model.overflow.numpy(), self.model.reports.numpy()
        self.bell = device.new_bell(self.model.bell, awake=awake)
        self.timeout_ns = round(timeout_s * 1e9)
        self.run_ahead_waits = self.plan_waits = 0
        self.expected = 0
        self.stack: LayerStack | None = None
        self.looks_ahead = not device.immediate and platform.machine().lower() in _IN_ORDER
        self._read: list[Callable[[], bool] | None] = [None] * run_ahead
        self._device = device
        self._late: Update | None = None

    def begin(self, iteration: int, counts: bool, group: Sequence[int]) -> None:
        """Write down the row of an iteration; waits while the host is too far ahead of the device.

        Raises:
            BalancerError: E218 when the device has not begun an iteration that was launched: it would take this row for
                another one.
        """
        place = iteration % len(self._read)
        waited = self._read[place]
        if waited is not None and waited():
            self.run_ahead_waits += 1
        self._require_begun(iteration - 1 - (0 if self._device.immediate else len(self._read)))
        self._write(iteration, counts, group)
        self._read[place] = self._device.submitted()

    def _require_begun(self, iteration: int) -> None:
        begun = int(self._begun[0])
        if begun < iteration:
            raise BalancerError(
                "E218", f"the device has begun iteration {begun} last, and iteration {iteration} is over",
                why="nothing of an iteration in between was launched",
                hint="run all layers, or replay a graph of them, in every iteration",
            )  # fmt: skip

    def skip(self, iteration: int) -> None:
        """The iteration was aborted, perhaps before its first layer: the next one comes after it. The device idles."""
        if int(self.model.row(iteration)[0]) != iteration:
            self._write(iteration, False, ())
        self.model.turn.copy_(self.model.row(iteration))
        self.model.begun.fill_(iteration)
        self._device.synchronize()

    def _write(self, iteration: int, counts: bool, group: Sequence[int]) -> None:
        row = self._turns[iteration % len(self._turns)]
        row[0] = -1
        row[1:] = 0
        row[1] = int(counts)
        for layer in group:
            row[2 + layer] = 1
        row[0] = iteration  # last: the device may look for it at any time, see `looks_ahead`

    def report(self, layer: int, due: int) -> list[int]:
        """What the device says of the plan of a layer that is due in that iteration, [REPORT]."""
        report: list[int] = self._reports[due % len(self._reports), layer].tolist()
        return report

    def await_plan(self, update: Update) -> None:
        """Return when the copies of a plan are enqueued, before what waits for them is; at most the timeout.

        The device may otherwise wait for copies that the driver does not take: launching holds the driver's lock while
        the queue of launches is full, and it stays full while the device waits. After a wait in vain nobody waits again
        until that update is done.
        """
        if update.done.is_set():
            return
        if self._late is not None and not self._late.done.is_set():
            return
        self.plan_waits += 1
        begun = time.monotonic()
        self._late = None if update.done.wait(self.timeout_ns / 1e9) else update
        update.waited_s += time.monotonic() - begun

    @property
    def wait(self) -> Callable[[int, int, int], int] | None:
        """How `control.vote` waits where the device is the host: (layer, due, timeout ns) -> ns; None on a GPU."""
        return self._wait_on_host if isinstance(self.bell, CpuBell) else None

    def _wait_on_host(self, layer: int, due: int, timeout_ns: int) -> int:
        assert isinstance(self.bell, CpuBell)
        if int(self.model.ready[layer]) >= due:
            return 0
        begun = time.monotonic_ns()
        self.bell.wait_for(lambda: int(self.model.ready[layer]) >= due, timeout_ns / 1e9)
        return time.monotonic_ns() - begun

    def check(self) -> None:
        """Raise BalancerError E134 when a count went beyond int32; it is told once."""
        if self._overflow.any():
            layer = int(self._overflow.argmax())
            iteration = int(self._overflow[layer]) - 1
            self._overflow[:] = 0
            raise BalancerError(
                "E134", f"layer {layer}: a count of tokens overflows",
                why=f"in iteration {iteration}, int32 holds {2**31 - 1}",
                hint="split the batch into more iterations",
            )  # fmt: skip
