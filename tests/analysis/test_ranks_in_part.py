"""Ranks of which a trace holds less than of others: what is not known of them is no figure of theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.collectives import straggling
from moe_eplb.analysis.merge import merge
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.stall import main_stall
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture

NCCL = "ncclDevKernel_AllReduce"


def _iterating(*iterations: tuple[int, ...]) -> Capture:
    """Ranks with a collective in each of their iterations; the one of rank R begins R ns late."""
    made = MakeCapture()
    for rank, mine in enumerate(iterations):
        for iteration in mine:
            begin = 1000 * iteration
            made.gpu(Role.COMPUTE, begin, begin + 100, 7, rank=rank, iteration=iteration)
            made.gpu(Role.COMM, begin + 100 + rank, begin + 200, 20, NCCL, rank=rank, iteration=iteration)
    return made.done()


@pytest.mark.parametrize(
    ("iterations", "asked", "skews", "unmatched"),
    [
        (((2, 3), (2, 3), (2, 3)), 3, [2], 0),
        (((2, 3), (2, 3), (2,)), 3, [], 2),  # who of all three came last nobody knows
        (((2, 3), (2,)), 3, [], 1),
        (((2, 3), (2,)), 2, [1], 0),
    ],
)
def test_a_rank_without_the_selected_iteration_has_no_part_in_its_collectives(
    iterations: tuple[tuple[int, ...], ...], asked: int, skews: list[int], unmatched: int
) -> None:
    report = make_trace_report(_iterating(*iterations), Selection(iterations=((asked, asked),)))
    assert [row.skew_max_ns for row in report.collectives] == skews
    assert report.unmatched_collectives == unmatched
    alone = make_trace_report(_iterating(*iterations), Selection(ranks=((0, 0),), iterations=((asked, asked),)))
    assert (alone.collectives, alone.unmatched_collectives, alone.notes) == ((), 0, ())


def test_collectives_of_different_iterations_are_not_the_same() -> None:
    found = straggling(_iterating((2, 3, 5), (2, 3, 4)))
    assert (found.late.tolist(), found.unmatched) == ([[0, 1], [0, 1]], 2)
    unnamed = _iterating((2,), (3,))
    unnamed.gpu["iteration"][unnamed.gpu["rank"] == 1] = c.UNKNOWN
    assert (len(straggling(unnamed).name), straggling(unnamed).unmatched) == (1, 0)


def _waiting(rank: int, recorded: bool, streams: int = 2) -> Capture:
    """A rank whose main stream stands still for the balancer for 50 ns, in a file that may not record waits."""
    made = MakeCapture()
    for stream, name in ((7, "Main"), (20, "MoeBalancer")):
        made.stream(stream, name, rank)
    made.gpu(Role.COMPUTE, 10, 100, 7, rank=rank, iteration=1, correlation=101)
    made.call(0, 2, 101)
    if streams > 1:
        made.gpu(Role.EPLB_MIGRATE, 30, 145, 20, rank=rank, iteration=1, correlation=102)
        made.call(20, 22, 102)
        made.wait(7, 20, at=40)
    made.gpu(Role.EPLB_MIGRATE, 30, 145, 30, rank=rank, iteration=1, kind=c.UPDATER_WORK)  # on no stream of a GPU
    made.gpu(Role.COMPUTE, 150, 200, 7, rank=rank, iteration=1, correlation=103)
    made.call(50, 52, 103)
    whole = made.done()
    for table in (whole.calls, whole.syncs):
        table["process"] = table["rank"] = rank
    return replace(whole if recorded else replace(whole, syncs=whole.syncs[:0]), source=f"rank {rank}")


def test_what_the_balancer_costs_is_not_known_if_a_rank_does_not_record_waits() -> None:
    stalls = {recorded: main_stall(merge([_waiting(0, True), _waiting(1, recorded)])) for recorded in (True, False)}
    assert stalls[True] is not None
    assert stalls[True].idle == {(0, 1): 50, (1, 1): 50}
    assert stalls[False] is None
    alone = main_stall(merge([_waiting(0, True), _waiting(1, False, streams=1)]))  # no other stream to wait for
    assert alone is not None
    assert alone.idle == {(0, 1): 50}


@pytest.mark.parametrize(("streams", "rank", "known"), [(2, 0, True), (2, 1, False), (1, 1, False)])
def test_what_is_known_of_a_rank_is_what_its_own_file_tells(streams: int, rank: int, known: bool) -> None:
    merged = merge([_waiting(0, True), _waiting(1, False, streams)])
    report = make_trace_report(merged, Selection(ranks=((rank, rank),)))
    assert report.path is not None
    assert (report.stall is not None, report.path.waits_known) == (known, known)
    assert report.stall is None or (report.stall.idle_ns, report.stall.worst) == (50, {1: 50})
