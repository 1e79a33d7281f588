"""What the balancer costs the main stream, and when nobody can know it."""

from __future__ import annotations

import pytest

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.critical_path import critical_path
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.stall import main_stall
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture, stalled

MAIN, BALANCER = 7, 20


def test_a_late_balancer_stalls_the_main_stream() -> None:
    stall = main_stall(stalled(migrated_until=145))
    assert stall is not None
    assert (stall.idle, stall.spin, stall.total) == ({(0, 2): 50}, {}, 50)


def test_a_balancer_that_was_done_in_time_does_not() -> None:
    stall = main_stall(stalled(migrated_until=100))
    assert stall is not None
    assert stall.total == 0


def test_what_the_host_launched_late_is_not_the_balancers_fault() -> None:
    made = MakeCapture()
    made.stream(MAIN, "Main")
    made.launched(Role.COMPUTE, 0, 10, 20)
    made.launched(Role.EPLB_MIGRATE, 20, 30, 90, BALANCER)
    made.wait(MAIN, BALANCER, at=40)
    made.launched(Role.COMPUTE, 78, 100, 110)
    stall = main_stall(made.done())
    assert stall is not None
    assert stall.idle == {(0, -1): 20}


def test_waiting_for_other_work_is_no_stall_of_the_balancer() -> None:
    made = MakeCapture()
    made.stream(MAIN, "Main")
    made.launched(Role.COMM, 0, 10, 90, 21)
    made.wait(MAIN, 21, at=12)
    made.launched(Role.COMPUTE, 20, 95, 99)
    stall = main_stall(made.done())
    assert stall is not None
    assert stall.total == 0


@pytest.mark.parametrize(("gathered_until", "stalled"), [(90, 0), (60, 40), (45, 50)])
def test_what_another_wait_costs_is_no_stall_of_the_balancer(gathered_until: int, stalled: int) -> None:
    """Main is free from 50 on, the balancer done at 70, and what waits for both begins at 100."""
    made = MakeCapture()
    made.stream(MAIN, "Main")
    made.launched(Role.COMPUTE, 0, 10, 50)
    made.launched(Role.EPLB_STATISTIC, 3, 20, 70, BALANCER)
    made.launched(Role.COMM, 6, 20, gathered_until, 21)
    made.wait(MAIN, BALANCER, at=12)
    made.wait(MAIN, 21, at=16)
    made.launched(Role.COMPUTE, 20, 100, 120)
    stall = main_stall(made.done())
    assert stall is not None
    assert stall.total == stalled


def test_spinning_on_the_main_stream_is_stall_as_a_whole() -> None:
    made = MakeCapture()
    made.stream(MAIN, "Main")
    made.launched(Role.EPLB_STATISTIC, 0, 5, 6, BALANCER)
    made.wait(MAIN, BALANCER, at=8)
    made.launched(Role.EPLB_WAIT, 15, 20, 45, iteration=1)
    stall = main_stall(made.done())
    assert stall is not None
    assert (stall.idle, stall.spin) == ({}, {(0, 1): 25})


def test_a_source_without_waits_leaves_the_stall_unknown() -> None:
    made = MakeCapture()
    made.launched(Role.COMPUTE, 0, 10, 100)
    made.launched(Role.EPLB_MIGRATE, 20, 30, 140, BALANCER)
    made.launched(Role.COMPUTE, 50, 150, 200)
    assert main_stall(made.done()) is None


@pytest.mark.parametrize(("record", "known"), [(1, True), (30, False), (c.UNKNOWN, False)])
def test_a_wait_whose_record_is_lost_leaves_the_stall_unknown_unless_it_was_before_the_capture(
    record: int, known: bool
) -> None:
    """Calls of the capture have the correlations 11 and upwards."""
    made = MakeCapture()
    made.stream(MAIN, "Main")
    for number in range(10):
        made.launched(Role.COMPUTE, number, 100 + number, 101 + number)
    made.wait(MAIN, BALANCER, at=20)
    made.wait(MAIN, BALANCER, at=30, record=record)
    made.launched(Role.COMPUTE, 40, 200, 210)
    whole = made.done()
    capture = whole.with_tables({"calls": whole.calls[10:], "gpu": whole.gpu[10:].copy()})
    assert (main_stall(capture) is not None) == known
    assert critical_path(capture, 0, 0).waits_known == known


def _two_gpus(device: int) -> Capture:
    """A process with two GPUs and streams of the same numbers on both; the wait is on the first one's main stream."""
    made = MakeCapture()
    for gpu in (0, 1):
        made.launched(Role.COMPUTE, 10 + gpu, 20, 100, MAIN, device=gpu)
        made.launched(Role.EPLB_STATISTIC, 12 + gpu, 20, 150 + 200 * gpu, BALANCER, device=gpu)
    made.wait(MAIN, BALANCER, at=20, device=device)
    made.launched(Role.COMPUTE, 30, 500, 600, MAIN, device=1)
    made.launched(Role.COMPUTE, 40, 160, 260, MAIN, device=0)
    return made.done()


def test_streams_of_two_gpus_of_a_process_are_not_mixed_up() -> None:
    capture = _two_gpus(device=0)
    stall = main_stall(capture)
    assert stall is not None
    assert stall.idle == {(0, -1): 60}
    ((held, on),) = Dependencies(capture).waits.tolist()
    assert (capture.gpu["device"][[held, on]].tolist(), capture.gpu["end"][on]) == ([0, 0], 150)


def test_a_wait_that_does_not_say_on_which_of_two_gpus_it_is_leaves_the_stall_unknown() -> None:
    assert main_stall(_two_gpus(device=c.UNKNOWN)) is None
    assert main_stall(_two_gpus(device=5)) is None


@pytest.mark.parametrize("said", [c.UNKNOWN, 5])
def test_with_one_gpu_it_does_not_matter_what_a_wait_says(said: int) -> None:
    both = _two_gpus(device=said)
    stall = main_stall(both.with_tables({"gpu": both.gpu[both.gpu["device"] == 0]}))
    assert stall is not None
    assert stall.idle == {(0, -1): 60}


def test_two_gpus_that_stand_still_at_once_both_count() -> None:
    made = MakeCapture()
    for device in (0, 1):
        made.launched(Role.COMPUTE, 10 + device, 20, 100, MAIN, device=device)
        made.launched(Role.EPLB_STATISTIC, 12 + device, 20, 150, BALANCER, device=device)
        made.wait(MAIN, BALANCER, at=20, device=device)
        made.launched(Role.COMPUTE, 30 + device, 160, 260, MAIN, device=device)
    stall = main_stall(made.done())
    assert stall is not None
    assert stall.idle == {(0, -1): 120}
