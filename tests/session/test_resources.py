"""What a run needs may be missing: shared memory, disk, its folder. Each is one clear error, and nothing stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.errors import ExitCode, RunFailed, UsageError
from moe_eplb.core.events import HOST, Kind
from moe_eplb.recording import event_log
from moe_eplb.recording.log_format import read_log
from moe_eplb.session.folder import close_folder, open_folder
from moe_eplb.session.postmortem import last_events

ROOT = Path(__file__).parents[2]
SCENARIO = """\
ranks: 2
iterations: {iterations}
timeout_s: 60
model: {{layers: 2, experts: 16, top_k: 2, hidden: 64, intermediate: 64}}
workload: {{kind: zipf, tokens_per_rank: 16}}
balancer: {{num_slots: 24, layer_updates_per_iter: 2, empty_group: never}}
"""


def _namespace() -> list[str]:
    """How a command gets file systems of its own here; empty when it cannot."""
    for options in (["-m"], ["-r", "-m"]):
        command = ["unshare", *options]
        mount = [*command, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]
        if shutil.which("unshare") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            return command
    return []


NAMESPACE = _namespace()
mounts = pytest.mark.skipif(not NAMESPACE, reason="no file system can be mounted here, not even in a namespace")


def with_small(place: Path, size: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``eplbctl`` where `place` is a file system of `size`."""
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"; exit 99'
    command = [*NAMESPACE, "sh", "-c", script, "sh", size, str(place), sys.executable, "-m", "eplbctl", *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip


def scenario(folder: Path, iterations: int = 4) -> str:
    (folder / "s.yaml").write_text(SCENARIO.format(iterations=iterations))
    return "s.yaml"


def assert_failed(done: subprocess.CompletedProcess[str], code: str) -> None:
    everything = done.stdout + done.stderr
    assert done.returncode == ExitCode.FAILED, everything
    assert f"error[{code}]" in everything
    assert "Traceback" not in everything
    assert "internal error" not in everything


@mounts
def test_full_shared_memory_is_told(tmp_path: Path) -> None:
    done = with_small(Path("/dev/shm"), "256k", tmp_path, "run", scenario(tmp_path), "--out", "run")
    assert_failed(done, "E160")
    assert "bytes are required" in done.stdout
    assert "eplbctl shm clean" in done.stdout


@mounts
@pytest.mark.parametrize("size", ["4k", "64k", "2m"])
def test_a_full_disk_is_told(size: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    done = with_small(tmp_path / "runs", size, tmp_path, "run", scenario(tmp_path, 150))
    # With 2m the ranks may find no room for their records and leave enough for all else: then the order is unknown.
    assert done.returncode in (ExitCode.FAILED, ExitCode.USAGE, ExitCode.UNKNOWN), done.stdout + done.stderr
    assert done.returncode != ExitCode.UNKNOWN or "records dropped" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "internal error" not in done.stderr
    assert "No space left on device" in done.stdout + done.stderr


@mounts
def test_a_full_disk_leaves_no_half_written_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = with_small(tmp_path / "out", "4k", tmp_path, "scenario", "schema", "-o", "out/schema.json")
    assert_failed(done, "E183")
    assert done.stderr.count("\n") == 2


def test_files_that_may_not_grow_are_told(tmp_path: Path) -> None:
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
    limited += "from eplbctl.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", scenario(tmp_path), "--out", "run"], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=90, check=False,
    )  # fmt: skip
    assert_failed(done, "E053")
    assert "File too large" in done.stdout


def test_a_log_on_a_full_disk_counts_what_it_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reserved: list[int] = []

    def fallocate(file: int, offset: int, length: int) -> None:
        if len(reserved) == 3:  # the header, and twice ten rows
            raise OSError(28, "No space left on device")
        reserved.append(length)

    monkeypatch.setattr(event_log, "_RESERVED_ROWS", 10)
    monkeypatch.setattr(event_log.os, "posix_fallocate", fallocate)
    with event_log.EventLog(tmp_path / "log", 0, capacity=1000) as log:
        tokens = [log.begin(Kind.STEP, -1, i, HOST) for i in range(25)]
        for token in tokens:
            log.end(token)
        log.mark(Kind.STEP, -1, 25, HOST)
    header, records = read_log(tmp_path / "log")
    assert tokens == [*range(20), *[-1] * 5]
    assert (header.dropped, header.closed) == (6, True)
    assert records["iteration"].tolist() == list(range(20))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'log'} takes no more records: No space left on device"
    ]


def test_a_log_reserves_the_disk_that_it_uses(tmp_path: Path) -> None:
    with event_log.EventLog(tmp_path / "log", 0) as log:
        assert (tmp_path / "log").stat().st_blocks * 512 < 1 << 20
        log.mark(Kind.STEP, -1, 0, HOST)
        assert 1 << 20 < (tmp_path / "log").stat().st_blocks * 512 < 4 << 20


def test_two_runs_that_want_one_folder(tmp_path: Path) -> None:
    loaded = scenarios.loads(SCENARIO.format(iterations=4), "s.yaml")
    open_folder(tmp_path / "run", loaded, launcher="spawn", argv=())
    (tmp_path / "run/meta.json").unlink()  # as before the first one has written it
    with pytest.raises(UsageError, match="E011"):
        open_folder(tmp_path / "run", loaded, launcher="spawn", argv=())


def test_a_folder_that_was_taken_away(tmp_path: Path) -> None:
    loaded = scenarios.loads(SCENARIO.format(iterations=4), "s.yaml")
    open_folder(tmp_path / "run", loaded, launcher="spawn", argv=())
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunFailed, match="E183"):
        close_folder(tmp_path / "run", loaded)


def test_half_a_log_does_not_hide_why_a_rank_died(tmp_path: Path) -> None:
    loaded = scenarios.loads(SCENARIO.format(iterations=4), "s.yaml")
    open_folder(tmp_path, loaded, launcher="spawn", argv=())
    (tmp_path / "events.rank0.bin").write_bytes(b"")
    assert last_events(tmp_path, 2).splitlines() == [
        "  last event of rank 0: unknown, an event log has no header",
        "  last event of rank 1: none, it had not started",
    ]
    verdict = close_folder(tmp_path, loaded, failure="error[E180]: rank 0 died")
    assert verdict.failure.startswith("error[E180]: rank 0 died\n")
    assert verdict.exit_code is ExitCode.FAILED


def test_two_instances_at_once_do_not_interfere(tmp_path: Path) -> None:
    path = scenario(tmp_path, 30)
    stale = Path("/dev/shm/moe_eplb-0123456789ab-999999999-1-test")
    stale.write_bytes(b"x")
    command = [sys.executable, "-m", "eplbctl", "run", path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [run.communicate(timeout=90) for run in both]
    assert [run.returncode for run in both] == [0, 0], ends
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert not stale.exists()
    for out, _ in ends:
        assert out.startswith("s: valid")
