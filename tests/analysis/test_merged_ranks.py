"""Several ranks as one trace: clocks, ranks, stragglers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.collective_rows import collective_rows
from moe_eplb.analysis.collectives import straggling
from moe_eplb.analysis.merge import align, merge, merge_aligned
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.readers.any import read_capture, read_captures
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture
from tests.analysis.profiler_traces import expert_parallel

NCCL = "ncclDevKernel_AllReduce"
TRACES = Path(__file__).resolve().parents[2] / "traces"
RECORDED = TRACES / "recorded"
TWO_GPUS = sorted(path.name for path in RECORDED.glob("*_2gpu.nsys.sqlite.xz"))


def _rank(rank: int, starts: list[int], ends: list[int], clock: int = 0) -> Capture:
    """A rank with one collective after another; before each it computes from the end of the one before."""
    made = MakeCapture()
    before = clock
    for start, end in zip(starts, ends, strict=True):
        made.gpu(Role.COMPUTE, before, clock + start, 7, rank=rank)
        made.gpu(Role.COMM, clock + start, clock + end, 20, NCCL, rank=rank)
        before = clock + end
    return replace(made.done(), source=f"rank {rank}")


def _of_rank(capture: Capture, rank: int) -> Capture:
    tables = {
        name: table[table["rank"] == rank] if "rank" in (table.dtype.names or ()) else table
        for name, table in capture.tables().items()
    }
    streams = {key: name for key, name in capture.streams.items() if key[0] == rank}
    return replace(capture, source=f"rank {rank}", streams=streams).with_tables(tables)


def _with_work_beside(rank: int, clock: int = 0) -> Capture:
    """Ten collectives, and in the range of each nine copies, fills and kernels at times of the rank's own."""
    made, chance = MakeCapture(), Random(rank)
    for start in range(clock, clock + 10**9, 10**8):
        made.range("dispatch", start, start + 10**7, domain="moe_eplb")
        for launch in range(9):
            kind, name = ((c.MEMCPY, "Memcpy HtoD"), (c.MEMSET, "Memset"), (c.KERNEL, "_pack_rows"))[launch % 3]
            beside = start + chance.randrange(10**7, 8 * 10**7)
            made.launched(None, start + 100 * launch, beside, beside + 10, name=name, kind=kind)
        made.launched(None, start + 1000, start + 9 * 10**7, start + 9 * 10**7 + 1000 + rank, name=NCCL)
    tables = {name: table.copy() for name, table in made.done().tables().items()}
    for name in ("gpu", "calls", "ranges"):
        tables[name]["rank"] = rank
    return replace(made.done(), source=f"rank {rank}").with_tables(tables)


@pytest.mark.parametrize("name", TWO_GPUS)
def test_ranks_of_a_recorded_job_find_the_clock_that_they_had(name: str) -> None:
    whole = read_capture(RECORDED / name)
    first, other = align([replace(_of_rank(whole, rank), utc=None) for rank in (0, 1)])
    assert first.offset == 0
    assert abs(other.offset) < 1000
    assert other.certain
    rows, _ = collective_rows(prepare(whole))
    assert {(row.name[:10], row.count) for row in rows} == {("ncclDevKer", 8)}
    assert len(rows) == 3


def test_what_lies_beside_a_collective_in_its_range_is_none() -> None:
    captures = [_with_work_beside(0), _with_work_beside(1, 10**9)]
    _, alignment = align(captures)
    assert (alignment.offset, alignment.certain) == (-(10**9) - 1, True)
    merged = prepare(merge(captures))
    communication = merged.gpu["role"] == c.ROLE_CODE[Role.COMM]
    assert communication.all()
    rows, unmatched = collective_rows(merged)
    assert [(row.name, row.count, row.skew_max_ns) for row in rows] == [(NCCL, 10, 1)]
    assert unmatched == 0


def test_a_table_of_the_users_says_which_kernels_are_collectives(tmp_path: Path) -> None:
    made = MakeCapture()
    for rank in (0, 1):
        made.gpu(None, 10 + rank, 20, name="my_gather_kernel", rank=rank)
    assert collective_rows(prepare(made.done())) == ((), 0)
    table = tmp_path / "roles.yaml"
    table.write_text("kernels:\n  - {role: comm, name: '^my_gather_kernel$'}\n")
    ((row,), _) = collective_rows(prepare(made.done(), tables=[table]))
    assert (row.name, row.count, row.skew_max_ns) == ("my_gather_kernel", 1, 1)


def test_clocks_are_aligned_by_common_collectives() -> None:
    ends = [200, 400, 600, 800]
    first = _rank(0, [100, 300, 500, 700], ends)
    other = _rank(1, [150, 350, 510, 790], [end + extra for end, extra in zip(ends, (0, 2, -2, 0), strict=True)], 10**9)
    _, alignment = align([first, other])
    assert (alignment.offset, alignment.certain) == (-(10**9), True)
    assert alignment.uncertain_ns is not None
    assert alignment.uncertain_ns <= 2
    merged = merge([first, other])
    assert merged.notes == ()
    assert merged.ranks == [0, 1]
    assert merged.gpu["start"][merged.gpu["rank"] == 1].tolist() == [0, 150, 200, 350, 402, 510, 598, 790]


def test_given_offsets_are_taken_as_they_are() -> None:
    captures = [_rank(0, [10], [20]), _rank(1, [10], [20])]
    merged = merge(captures, [0, 1000])
    assert merged.gpu["start"].tolist() == [0, 10, 1000, 1010]
    with pytest.raises(TraceError, match="E066"):
        merge(captures, [1, 2, 3])


def test_ranges_that_were_never_closed_stay_open() -> None:
    made = MakeCapture()
    made.range("open", 5, -1)
    made.range("closed", 6, 9)
    made.gpu(Role.COMPUTE, 0, 1)
    merged = merge([made.done(), _rank(1, [10], [20])], [1000, 0])
    assert list(zip(merged.ranges["start"].tolist(), merged.ranges["end"].tolist(), strict=True)) == [
        (1005, -1), (1006, 1009),
    ]  # fmt: skip


def test_wall_clocks_where_there_is_nothing_in_common() -> None:
    first, other = (replace(_rank(rank, [10], [20]), utc=10**18 + rank * 500) for rank in (0, 1))
    _, alignment = align([first, other])
    assert (alignment.offset, alignment.uncertain_ns) == (500, None)
    merged = merge([first, other])
    assert merged.gpu["start"].tolist() == [0, 10, 500, 510]
    assert merged.notes == ("rank 1: clock moved by 500 ns, by wall clock, of unknown accuracy",)


def test_no_clock_in_common_is_said() -> None:
    merged = merge([_rank(0, [10], [20]), _rank(1, [10], [20])])
    assert merged.notes == (
        "rank 1: clock moved by 0 ns, nothing to align by: 1 common collectives, of unknown accuracy",
    )


def test_clocks_that_collectives_do_not_agree_on_are_uncertain() -> None:
    first = _rank(0, [100, 10**6, 2 * 10**6], [200, 10**6 + 100, 2 * 10**6 + 100])
    other = _rank(1, [100, 500_000, 3 * 10**6], [200, 500_100, 3 * 10**6 + 100])
    assert not align([first, other])[1].certain
    assert "give or take" in merge([first, other]).notes[0]
    _, alignment = align([replace(first, utc=10**18), replace(other, utc=10**18 + 500)])
    assert (alignment.offset, alignment.uncertain_ns) == (500, None)
    assert "by wall clock, since 3 common collectives differ by 750000 ns" in str(alignment)


def test_one_rank_twice_is_an_error() -> None:
    with pytest.raises(TraceError, match="rank 0 is in rank 0 and in rank 0"):
        merge([_rank(0, [1], [2]), _rank(0, [1], [2])])


def test_the_alignment_that_is_told_is_the_one_that_is_applied() -> None:
    captures = [replace(_rank(0, [100, 300, 500], [200, 400, 600], clock), rank_source="counted") for clock in (0, 77)]
    merged, told = merge_aligned(captures)
    assert [alignment.offset for alignment in align(captures)] == [0, -77]
    assert told == [str(alignment) for alignment in align(captures)]
    assert merged.gpu["start"].tolist() == [0, 100, 200, 300, 400, 500] * 2


def test_of_one_rank_twice_nothing_is_common() -> None:
    captures = [_rank(0, [100, 300, 500], [200, 400, 600], clock) for clock in (0, 77)]
    assert "nothing to align by: 0 common collectives" in str(align(captures)[1])


def test_no_time_becomes_negative() -> None:
    first = replace(_rank(0, [10], [20], clock=5), utc=10**18)
    merged, told = merge_aligned([first, _rank(1, [10], [20])], [0, -1000])
    assert merged.gpu["start"].tolist() == [1005, 1015, 0, 10]
    assert merged.utc == 10**18 - 1000
    assert told[-1] == merged.notes[-1] == "all times were moved by 1000 ns, so that none is negative"
    assert merge([first], [-5]).notes == ()


@pytest.mark.parametrize(("offsets", "code"), [((0, 2**62), "E066"), ((-(2**61), 2**61), "E066"), ((0, 2**61), "E062")])
def test_clocks_too_far_apart_are_an_error(offsets: tuple[int, int], code: str) -> None:
    with pytest.raises(TraceError, match=code):
        merge([_rank(0, [10], [20]), _rank(1, [10], [20])], offsets)


def _reported(capture: Capture, moved: int) -> TraceReport:
    """The report on a capture, with its only times of day moved back."""
    prepared = prepare(capture)
    report = make_trace_report(prepared, checks=check_order(prepared).checks)
    exposed = tuple(replace(one, start=one.start - moved, end=one.end - moved) for one in report.exposed)
    return replace(report, exposed=exposed)


@pytest.mark.parametrize("moved", [1, 10**6 + 7, 10**15])
@pytest.mark.parametrize(
    "name", ["good_captures/path_b.nsys.sqlite.gz", "good_captures/path_c.trace.sqlite.gz", f"recorded/{TWO_GPUS[0]}"]
)
def test_a_constant_shift_changes_no_result(name: str, moved: int) -> None:
    capture = read_capture(TRACES / name)
    assert _reported(merge([capture], [moved]), moved) == _reported(capture, 0)


def test_files_that_do_not_state_their_rank_are_numbered() -> None:
    captures = [replace(_rank(0, [1], [2]), rank_source="counted", source=name) for name in ("a", "b", "c")]
    assert merge(captures).ranks == [0, 1, 2]


def test_texts_ranges_and_launches_of_merged_files_stay_together(tmp_path: Path) -> None:
    paths = [expert_parallel(rank, seed=rank).write(tmp_path / f"{rank}.json.gz") for rank in (0, 1)]
    alone = [prepare(read_capture(path)) for path in paths]
    merged = prepare(read_captures(paths))
    for rank, one in enumerate(alone):
        mine = merged.gpu[merged.gpu["rank"] == rank]
        assert [merged.names[n] for n in mine["name"]] == [one.names[n] for n in one.gpu["name"]]
        for column in ("role", "layer", "iteration", "stream"):
            assert mine[column].tolist() == one.gpu[column].tolist(), column
        assert np.diff(mine["start"]).tolist() == np.diff(one.gpu["start"]).tolist()


def test_who_came_last_and_how_long_the_others_waited() -> None:
    first = _rank(0, [100, 300, 600], [200, 400, 700])
    other = _rank(1, [150, 290, 699], [200, 400, 700])
    merged = merge([first, other], [0, 0])
    found = straggling(merged)
    assert found.late.tolist() == [[0, 50], [10, 0], [0, 99]]
    assert found.waited.tolist() == [[50, 0], [0, 10], [99, 0]]
    assert found.last.tolist() == [1, 0, 1]
    assert found.late_histogram() == {0: 1, 1: 2}
    assert found.imbalance.tolist() == pytest.approx([150 / 125, 100 / 95, 299 / 249.5])
    assert (found.unmatched, found.name) == (0, [NCCL] * 3)


def test_collectives_without_a_partner_are_counted_and_not_guessed() -> None:
    merged = merge([_rank(0, [10, 30], [20, 40]), _rank(1, [10], [20])], [0, 0])
    found = straggling(merged)
    assert (found.unmatched, len(found.name), found.imbalance.tolist()) == (3, 0, [])
