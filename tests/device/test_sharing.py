"""Memory that other processes read in place."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.sharing import Offer, SharedHostMemory

READ = """
import sys, torch
from moe_eplb.device.sharing import Offer, SharedHostMemory
sharing = SharedHostMemory()
storage = sharing.open(Offer(int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])))
print(torch.empty(0).set_(storage, 0, (int(sys.argv[3]) // 4,)).tolist())
sharing.close()
"""


def read(offer: Offer) -> str:
    command = [sys.executable, "-c", READ, str(offer.pid), offer.where.decode(), str(offer.size)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_another_process_reads_what_is_there_now_and_views_stay_valid() -> None:
    weights = torch.arange(6.0).reshape(3, 2)
    view, names = weights[1], set(os.listdir("/dev/shm"))
    offer = SharedHostMemory().offer(weights.untyped_storage())
    assert set(os.listdir("/dev/shm")) <= names, "the memory has no name that could outlive this process"
    assert read(offer) == "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"
    view += 10
    assert weights.tolist() == [[0.0, 1.0], [12.0, 13.0], [4.0, 5.0]]
    assert read(offer) == "[0.0, 1.0, 12.0, 13.0, 4.0, 5.0]"


def test_an_offer_can_be_made_twice() -> None:
    sharing, storage = SharedHostMemory(), torch.ones(4).untyped_storage()
    assert sharing.offer(storage) == sharing.offer(storage)


def test_what_is_not_there_is_an_error_with_the_process_and_a_way_out() -> None:
    offer = SharedHostMemory().offer(torch.ones(4).untyped_storage())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    for gone in (replace(offer, where=b"999999"), replace(offer, pid=ended.pid)):
        with pytest.raises(BalancerError, match=f"process {gone.pid}") as info:
            SharedHostMemory().open(gone)
        assert info.value.code == "E205"
        assert "weights_from: host" in (info.value.hint or "")
    assert not Path("/proc/999999").exists()
