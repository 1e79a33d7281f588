"""Names in shared memory: two instances side by side, and what a crash leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, host_memory, host_weights
from moe_eplb.balancer import load_balancer as load_balancer_module
from moe_eplb.balancer.host_memory import SHM_DIR, Segment, open_segment, remove_segment
from moe_eplb.core.errors import HostMemoryError
from tests.support.faults.base import Fault, demand

__all__ = ["FAULTS"]

ROOT = Path(__file__).parents[3]
SIZE = 256


class Instance:
    """A balancer of its own whose one expert's one weight is full of `value`."""

    def __init__(self, value: float) -> None:
        self.balancer = MoeLoadBalancer(0, 1, 1, options=BalancerOptions(commit_delay=2))
        layer = self.balancer.add_layer(1, 1, 1)
        layer.share_expert_weight(0, "w", torch.full((SIZE // 4,), value))
        layer.register_weight_slot(0, "w", torch.full((SIZE // 4,), value))
        self.balancer.finalize_model()
        self.segment = host_memory.segment_name(self.balancer.instance, "l0r0")

    def value(self) -> float:
        """What another rank finds under the segment's name."""
        return float(torch.frombuffer(open_segment(self.segment, SIZE), dtype=torch.float32)[0])


def check_side_by_side() -> None:
    """Two balancers that nobody gave names neither meet nor end one another."""
    first = Instance(1.0)
    try:
        try:
            second = Instance(2.0)
        except HostMemoryError as error:
            raise AssertionError(f"a second balancer cannot start: {error.code}") from error
        try:
            demand((SHM_DIR / first.segment).exists(), "the start of a balancer removes a living one's host copies")
            demand(first.value() == 1.0, "a second balancer takes the host copies of the first")
            demand(second.value() == 2.0, "the second balancer's host copies are not its own")
        finally:
            second.balancer.shutdown()
        demand((SHM_DIR / first.segment).exists(), "the end of a balancer removes another's host copies")
    finally:
        first.balancer.shutdown()
        remove_segment(first.segment)
    demand(not (SHM_DIR / first.segment).exists(), "a segment is left behind")


def check_after_a_crash() -> None:
    """What a killed owner left is gone when the next balancer starts, whatever its name."""
    program = (
        "import os, signal\nfrom moe_eplb.balancer import host_memory\n"
        "print(host_memory.create_segment('same-name', 'l0r0', 4096)[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program]
    for _ in range(5):  # another program of this machine may start a balancer, and clean up, in that very moment
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        left = done.stdout.strip()
        if (SHM_DIR / left).exists():
            break
    try:
        demand(done.returncode == -9 and (SHM_DIR / left).exists(), f"the owner was killed: {done.stderr}")
        MoeLoadBalancer(0, 1, 1, "same-name").shutdown()
        demand(not (SHM_DIR / left).exists(), "a crash's segment survives the next start")
    finally:
        remove_segment(left)


def one_name_for_all(patch: pytest.MonkeyPatch) -> None:
    """Every instance of every process has one name, and a segment that exists is taken over."""

    def fixed(instance: str, part: str, *, pid: int | None = None) -> str:
        return f"moe_eplb-shared-{part}"

    create = host_memory.create_segment

    def recreate(instance: str, part: str, size: int) -> object:
        remove_segment(fixed(instance, part))
        return create(instance, part, size)

    for module in (host_memory, host_weights):
        patch.setattr(module, "segment_name", fixed)
    patch.setattr(host_weights, "create_segment", recreate)


def one_name_and_exclusive(patch: pytest.MonkeyPatch) -> None:
    """Every instance has one name, and a segment that exists is an error."""
    patch.setattr(load_balancer_module, "new_instance", lambda: "shared")


def start_removes_everything(patch: pytest.MonkeyPatch) -> None:
    """A start removes every segment, whoever owns it."""

    def of_this_test_alone() -> list[Segment]:
        # Other runs on this machine must live, also while this one is broken.
        mine = [s for s in host_memory.list_segments() if s.owner_pid == os.getpid()]
        for segment in mine:
            remove_segment(segment.name)
        return mine

    patch.setattr(load_balancer_module, "clean_segments", of_this_test_alone)


def start_removes_nothing(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks after what a crash left."""
    patch.setattr(load_balancer_module, "clean_segments", list)


def owner_is_not_known(patch: pytest.MonkeyPatch) -> None:
    """A name tells nothing about its owner, so no segment can be called stale."""
    ticks = host_memory._start_ticks

    def as_named(pid: int) -> int:
        named = [int(path.name.rsplit("-", 3)[2]) for path in SHM_DIR.glob(f"moe_eplb-*-{pid}-*-l0r0")]
        return ticks(pid) or (named[0] if named else 0)

    patch.setattr(host_memory, "_start_ticks", as_named)


FAULTS = [
    Fault(
        "one shared-memory name for all instances, taken over", check_side_by_side, one_name_for_all,
        "a second balancer takes the host copies of the first",
    ),
    Fault(
        "one shared-memory name for all instances, refused", check_side_by_side, one_name_and_exclusive,
        "a second balancer cannot start: E161",
    ),
    Fault(
        "a start removes the host copies of a living balancer", check_side_by_side, start_removes_everything,
        "the start of a balancer removes a living one's host copies",
    ),
    Fault(
        "segments survive a crash", check_after_a_crash, start_removes_nothing,
        "a crash's segment survives the next start",
    ),
    Fault(
        "segments survive a crash because their owner is not known", check_after_a_crash, owner_is_not_known,
        "a crash's segment survives the next start",
    ),
]  # fmt: skip
