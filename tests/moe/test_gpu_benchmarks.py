"""The runner of all GPU benchmarks: it goes on where it was, and what does not end is ended."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu.__main__ import JOBS, Job
from moe_eplb.recording.children import Ended

WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2:]))"
NEVER_ENDS = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('half'); time.sleep(60)"


class Script(Job):
    """A job whose module is a script that is given the file to write."""

    def command(self, out: Path) -> list[str]:
        return [sys.executable, "-c", self.module, str(out), *self.arguments]


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many GPUs were asked for; they are there."""
    counts: list[int] = []
    monkeypatch.setattr(runner, "require_gpus", counts.append)
    return counts


def _call(monkeypatch: pytest.MonkeyPatch, jobs: dict[str, Job], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(runner, "JOBS", jobs)
    done = CliRunner().invoke(runner.main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout


def test_what_is_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    jobs = {"one": Script(WRITES, ("first",)), "two": Script(WRITES, ("second",)), "more": Script("1 / 0", gpus=2)}
    (tmp_path / "one.json").write_text("as it was", encoding="utf-8")
    code, told = _call(monkeypatch, jobs, "--out", str(tmp_path))
    assert code == 0, told
    assert (tmp_path / "one.json").read_text(encoding="utf-8") == "as it was"
    assert json.loads((tmp_path / "two.json").read_text(encoding="utf-8")) == ["second"]
    assert re.search(r"one +there already\n", told)
    assert re.search(r"two +\d+ +done\n", told)
    assert "more" not in told
    assert asked == [1]


def test_one_that_fails_or_does_not_end_leaves_no_file_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = {
        "fails": Script("raise SystemExit(7)"), "hangs": Script(NEVER_ENDS, usual_s=1), "empty": Script("pass"),
        "last": Script(WRITES),
    }  # fmt: skip
    begun = time.monotonic()
    code, told = _call(monkeypatch, jobs, "--out", str(tmp_path))
    assert code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hangs.part.json", "last.json"}
    assert re.search(r"fails +\d+ +ended with 7\n", told)
    assert re.search(r"hangs +\d+ +out of time\n", told)
    assert re.search(r"empty +\d+ +ended with 0, and wrote nothing\n", told)
    assert time.monotonic() - begun < 20, "a job ends at twice its usual time"


def test_none_begins_for_which_the_budget_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {"long": Script(WRITES, usual_s=100), "short": Script(WRITES, usual_s=1)}
    code, told = _call(monkeypatch, jobs, "--out", str(tmp_path), "--budget", "30")
    assert code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["short.json"]
    assert "left out: it takes 100 s" in told


def test_a_job_may_take_twice_its_usual_time_and_no_longer_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def run(command: list[str], *, mark: str, timeout_s: float) -> Ended:
        limits.append(timeout_s)
        return Ended(None, "")

    monkeypatch.setattr(runner, "run_bounded", run)
    jobs: dict[str, Job] = {"one": Script(NEVER_ENDS, usual_s=100)}
    for budget in ("1000", "150"):
        code, told = _call(monkeypatch, jobs, "--out", str(tmp_path), "--budget", budget)
        assert code == 1
        assert "out of time" in told
    assert limits == [200, pytest.approx(150, abs=5)]


def test_those_that_are_named_run_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, mark: str, timeout_s: float) -> Ended:
        ran.append(command)
        Path(command[-1]).write_text("{}", encoding="utf-8")
        return Ended(0, "")

    monkeypatch.setattr(runner, "run_bounded", run)
    code, told = _call(monkeypatch, dict(JOBS), "moving_peers", "gain_hot", "--out", str(tmp_path))
    assert code == 0, told
    assert asked == [2]
    peers, gain = (" ".join(command) for command in ran)
    assert (
        "-m torch.distributed.run --nproc-per-node 2 -m benchmarks.gpu.moving --tokens 4096 --slots 52 --out" in peers
    )
    assert "-m benchmarks.gpu.gain --layers 1 --rounds 4 --only hot --out" in gain
    assert "torch.distributed.run" not in gain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gain_hot.json", "moving_peers.json"]


def test_each_is_a_benchmark_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text(encoding="utf-8")
    folder = Path(runner.__file__).parent
    for name, job in JOBS.items():
        assert (folder / f"{job.module}.py").exists(), name
        assert f"benchmarks.gpu.{job.module} " in readme, name
