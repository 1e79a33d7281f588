"""Shared memory segments: private, reserved, unique, and gone after their owner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_eplb.balancer import host_memory as hm
from moe_eplb.core.errors import HostMemoryError


def test_create_open_remove() -> None:
    name, memory = hm.create_segment(hm.new_instance(), "l0r0", 8192)
    try:
        assert (hm.SHM_DIR / name).stat().st_mode & 0o777 == 0o600
        memory[:4] = b"abcd"
        assert hm.open_segment(name, 8192)[:4] == b"abcd"
        assert next(s for s in hm.list_segments() if s.name == name).alive
    finally:
        hm.remove_segment(name)
    assert not [s for s in hm.list_segments() if s.name == name]


def test_pages_are_reserved_before_mapping(tmp_path: Path) -> None:
    name, _ = hm.create_segment("i", "l0r0", 1 << 20, directory=tmp_path)
    assert (tmp_path / name).stat().st_blocks * 512 >= 1 << 20


def test_a_full_device_is_an_error_with_required_and_free_bytes() -> None:
    stat = os.statvfs(hm.SHM_DIR)
    size = stat.f_bavail * stat.f_frsize + (1 << 20)
    before = {s.name for s in hm.list_segments()}
    with pytest.raises(HostMemoryError, match=rf"{size} bytes are required, \d+ are free") as info:
        hm.create_segment(hm.new_instance(), "l0r0", size)
    assert info.value.code == "E160"
    assert {s.name for s in hm.list_segments()} == before


def test_a_reservation_that_fails_leaves_no_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostMemoryError, match="E160"):
        hm.create_segment("i", "l0r0", 4096, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_instances_never_share_a_name() -> None:
    assert hm.segment_name(hm.new_instance(), "l0r0") != hm.segment_name(hm.new_instance(), "l0r0")


def test_opening_a_missing_or_resized_segment(tmp_path: Path) -> None:
    with pytest.raises(HostMemoryError, match="E162"):
        hm.open_segment("moe_eplb-x-1-1-l0r0", 10, directory=tmp_path)
    name, _ = hm.create_segment("i", "l0r0", 4096, directory=tmp_path)
    with pytest.raises(HostMemoryError, match="4096, not 8192 bytes"):
        hm.open_segment(name, 8192, directory=tmp_path)


def test_a_killed_owners_segment_is_removed_by_the_next_start() -> None:
    code = (
        "import os, signal; from moe_eplb.balancer import host_memory as hm;"
        "print(hm.create_segment(hm.new_instance(), 'l0r0', 4096)[0], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    name = done.stdout.strip()
    assert done.returncode == -9
    assert (hm.SHM_DIR / name).exists()
    assert not next(s for s in hm.list_segments() if s.name == name).alive
    assert name in [s.name for s in hm.clean_segments()]
    assert not (hm.SHM_DIR / name).exists()


def test_living_segments_are_cleaned_only_when_asked(tmp_path: Path) -> None:
    name, _ = hm.create_segment("i", "l0r0", 4096, directory=tmp_path)
    (tmp_path / "moe_eplb-not-one-of-ours").touch()
    assert hm.clean_segments(directory=tmp_path) == []
    assert [s.name for s in hm.clean_segments(include_alive=True, directory=tmp_path)] == [name]


def test_no_torch_is_needed_to_look_after_segments() -> None:
    code = "import sys; import moe_eplb.balancer.host_memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("instance", ["a/b", "..\\/x", "a b", "x" * 300])
def test_a_name_that_is_no_plain_file_name_is_refused(instance: str, tmp_path: Path) -> None:
    with pytest.raises(HostMemoryError, match="E170"):
        hm.create_segment(instance, "l0r0", 16, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
