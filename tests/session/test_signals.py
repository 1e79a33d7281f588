"""A run that is told to end does so at once, leaves nothing behind, and says how it ended, whatever it was doing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_eplb.balancer.host_memory import clean_segments
from tests.support.as_a_terminal import restore_defaults

ROOT = Path(__file__).parents[2]
PROMPT_S = 3.0
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
LONG = """\
ranks: 2
iterations: 100000
timeout_s: 100
model: {layers: 2, experts: 16, top_k: 2, hidden: 16, intermediate: 16}
workload: {kind: zipf, tokens_per_rank: 16}
balancer: {num_slots: 24, layer_updates_per_iter: 2, empty_group: never}
record: {loads: false}
"""
SHORT = LONG.replace("100000", "4")

# Says on stdout when it comes to a place where a test wants to send a signal.
PROGRAM = """
import sys
import eplbctl.progress
from eplbctl.__main__ import main
from moe_eplb.session import fork_server, pool

def tell(what):
    print(what, flush=True)

class Progress(eplbctl.progress.Progress):
    def __call__(self, done, total):
        if done == 3:
            tell("iterating")

def start(start=fork_server.start):
    start()
    tell("starting")

def close_folder(*arguments, close_folder=pool.close_folder, **options):
    tell("judging")
    return close_folder(*arguments, **options)

eplbctl.progress.Progress, fork_server.start, pool.close_folder = Progress, start, close_folder
main()
"""


@dataclass(frozen=True)
class Told:
    """How a process group ended that got a signal."""

    code: int
    seconds: float
    errors: str
    left: list[str]


def session_members(leader: int) -> list[int]:
    """Living processes of a session."""
    lines = subprocess.run(["ps", "-eo", "pid,sid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in lines.splitlines()[1:]]
    return [int(pid) for pid, sid, stat in rows if int(sid) == leader and "Z" not in stat]


def segments_of(pids: list[int]) -> list[str]:
    return [name for name in os.listdir("/dev/shm") for pid in pids if f"-{pid}-" in name]


def tell(arguments: list[str], sent: signal.Signals, when: str | float, folder: Path, *, group: bool = False) -> Told:
    """Start `arguments` and send a signal when stdout holds the line `when`, or after so many seconds."""
    temporary = folder / "tmp"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=restore_defaults,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        if isinstance(when, str):
            assert when in (line.rstrip("\n") for line in run.stdout)
        else:
            time.sleep(when)
        members = session_members(run.pid)
        (os.killpg if group else os.kill)(run.pid, sent)
        before = time.monotonic()
        _, errors = run.communicate(timeout=60)
        seconds = time.monotonic() - before
    # The idle server that forks the ranks ends by itself when it sees that its client has.
    deadline = time.monotonic() + 5
    while (left := session_members(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    names = [f"process {pid}" for pid in left] + segments_of([*members, *left]) + os.listdir(temporary)
    return Told(run.returncode, seconds, errors, names)


def scenario(folder: Path, text: str = LONG, name: str = "long") -> str:
    (folder / f"{name}.yaml").write_text(text)
    return f"{name}.yaml"


def assert_clean(told: Told, sent: signal.Signals) -> None:
    assert (told.code, told.left) == (SIGNALS[sent], []), told.errors
    assert "Traceback" not in told.errors
    assert told.errors.rstrip().endswith(f"ended by {sent.name}")
    assert told.seconds < PROMPT_S


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
@pytest.mark.parametrize("when", ["starting", "iterating"])
def test_a_run_that_is_told_to_end_leaves_nothing(when: str, sent: signal.Signals, group: bool, tmp_path: Path) -> None:
    arguments = ["-c", PROGRAM, "run", scenario(tmp_path), "--out", "run"]
    assert_clean(tell(arguments, sent, when, tmp_path, group=group), sent)
    assert not (tmp_path / "run" / "verdict.json").exists()


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
def test_judging_may_be_ended_too(sent: signal.Signals, tmp_path: Path) -> None:
    arguments = ["-c", PROGRAM, "run", scenario(tmp_path, SHORT.replace(": 4\n", ": 60\n")), "--out", "run"]
    assert_clean(tell(arguments, sent, "judging", tmp_path), sent)
    assert list((tmp_path / "run").glob("*.tmp")) == []
    assert not (tmp_path / "run" / "verdict.json").exists()


def test_verify_may_be_ended_between_two_scenarios(tmp_path: Path) -> None:
    paths = [scenario(tmp_path, SHORT, "a"), scenario(tmp_path)]
    told = tell(["-c", PROGRAM, "verify", *paths, "-o", "out.json"], signal.SIGTERM, "judging", tmp_path)
    assert_clean(told, signal.SIGTERM)
    assert not (tmp_path / "out.json").exists()


def test_a_run_that_is_killed_leaves_at_most_segments_which_the_next_removes(tmp_path: Path) -> None:
    told = tell(["-c", PROGRAM, "run", scenario(tmp_path), "--out", "run"], signal.SIGKILL, "iterating", tmp_path)
    assert [name for name in told.left if not name.startswith("moe_eplb-")] == []
    assert os.listdir(tmp_path / "tmp") == []
    clean_segments()
    assert set(told.left).isdisjoint(os.listdir("/dev/shm"))


def test_torchruns_ranks_leave_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    told = tell([*launcher, "run", scenario(tmp_path), "--out", "run"], signal.SIGTERM, "iterating", tmp_path)
    assert [name for name in told.left if not name.startswith("torchelastic")] == []
    assert told.seconds < PROMPT_S


def _sweep() -> list[tuple[signal.Signals, float, str, bool]]:
    drawn = random.Random(2)
    return [
        (sent, round(drawn.uniform(0.0, 3.0), 2), command, drawn.random() < 0.5)
        for sent in SIGNALS
        for command in ("run", "verify", "run", "verify", "run")
    ]


@pytest.mark.parametrize(("sent", "delay", "command", "group"), _sweep())
def test_a_signal_at_any_time(sent: signal.Signals, delay: float, command: str, group: bool, tmp_path: Path) -> None:
    paths = [scenario(tmp_path, SHORT, "a"), scenario(tmp_path)]
    told = tell(["-m", "eplbctl", command, *paths], sent, delay, tmp_path, group=group)
    # Before the program's own first line the signal itself ends it, which a shell reports as the same code.
    code = told.code if told.code >= 0 else 128 - told.code
    assert (code, told.left) == (SIGNALS[sent], []), told.errors
    assert told.code < 0 or "Traceback" not in told.errors
    assert told.seconds < PROMPT_S


LOST = """
import signal, sys, time
from eplbctl import signals

class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

signals.listen()
try:
    Slow()
    time.sleep(20)
except signals.Terminated as terminated:
    sys.exit(terminated.exit_code)
"""


def run_program(program: str, prepare: Callable[[], None] = restore_defaults) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
        preexec_fn=prepare,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_signal_within_a_destructor_is_not_lost() -> None:
    assert run_program(LOST) == (143, "", "")


HASTY = """
import signal, sys
from eplbctl import signals

signals.listen()
try:
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGTERM)
        print("removed")
except signals.Terminated as terminated:
    sys.exit(terminated.exit_code)
"""


def test_a_second_signal_does_not_disturb_what_the_first_began() -> None:
    assert run_program(HASTY) == (130, "removed\n", "")


def test_a_signal_ignored_at_the_start_stays_ignored() -> None:
    def ignore_interrupts() -> None:
        restore_defaults()
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert run_program(HASTY, ignore_interrupts) == (143, "", "")


def test_signals_blocked_at_the_start_are_let_through() -> None:
    def block() -> None:
        restore_defaults()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    assert run_program(HASTY, block) == (130, "removed\n", "")
