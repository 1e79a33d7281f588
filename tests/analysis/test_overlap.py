"""Hidden and exposed time, exactly, on made-up streams and against a naive twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis.overlap import PAIRS, Hidden, measure
from moe_eplb.analysis.trace import OPEN, Records
from moe_eplb.core.events import HOST, KINDS, UPDATER, Kind

MAIN, COMM, BALANCER = 0, 3, 4
Row = tuple[int, int, int, Kind, int, int, int]


def _records(*rows: Row) -> Records:
    """Rows of (rank, iteration, layer, kind, stream, start, end)."""
    table = np.array(rows, dtype=np.int64).reshape(len(rows), 7)
    rank, iteration, layer, kind, stream, start, end = table.T
    zero = np.zeros(len(rows), dtype=np.int64)
    return Records(rank, np.arange(len(rows)), start, end, kind, stream, zero, layer, iteration, zero, zero)


def test_statistics_hide_behind_experts() -> None:
    records = _records(
        (0, 0, 0, Kind.EXPERTS, MAIN, 100, 200),
        (0, 0, 0, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, BALANCER, 50, 150),
        (0, 0, 0, Kind.LOAD_UPDATE, BALANCER, 140, 210),
    )
    overlap = measure(records, PAIRS["statistic"])
    assert overlap.whole == Hidden(total=160, hidden=100)
    assert overlap.whole.exposed == 60
    assert overlap.whole.overlap == pytest.approx(100 / 160)
    assert overlap.worst_exposed() == [60]


def test_nothing_to_hide_is_null() -> None:
    overlap = measure(_records((0, 0, 0, Kind.EXPERTS, MAIN, 0, 10)), PAIRS["balancer"])
    assert overlap.whole.overlap is None
    assert measure(_records(), PAIRS["balancer"]).whole == Hidden()


def test_waiting_is_no_work_on_either_side() -> None:
    records = _records(
        (0, 0, 0, Kind.START_WAIT_GPU_STAGE, BALANCER, 0, 100),
        (0, 0, 0, Kind.DONE_WAIT_GPU_STAGE, MAIN, 0, 100),
        (0, 0, 0, Kind.LOAD_UPDATE, BALANCER, 0, 100),
    )
    assert measure(records, PAIRS["balancer"]).whole == Hidden(total=100, hidden=0)


def test_communication_hides_the_balancer_but_is_no_compute() -> None:
    records = _records(
        (0, 0, 0, Kind.DISPATCH, MAIN, 0, 60),
        (0, 0, 0, Kind.EXPERTS, MAIN, 60, 80),
        (0, 0, 0, Kind.STATISTIC_REDUCE, BALANCER, 0, 100),
    )
    assert measure(records, PAIRS["balancer"]).whole == Hidden(100, 80)
    assert measure(records, PAIRS["balancer_compute"]).whole == Hidden(100, 20)


def test_unknown_work_hides_nothing() -> None:
    records = _records((0, 0, 0, Kind(24), BALANCER, 0, 10))
    unknown = np.array([999, 24])
    both = _records((0, 0, 0, Kind.EXPERTS, MAIN, 0, 10), (0, 0, 0, Kind.COMMIT, BALANCER, 0, 10))
    swapped = Records(*(unknown if name == "kind" else getattr(both, name) for name in both.__dataclass_fields__))
    assert measure(records, PAIRS["migration"]).whole == Hidden(10, 0)
    assert measure(swapped, PAIRS["migration"]).whole == Hidden(10, 0)
    assert swapped.roles().tolist() == ["unknown", "eplb_migrate"]


def test_communication_hides_behind_other_streams_only() -> None:
    records = _records(
        (0, 0, 0, Kind.DISPATCH, COMM, 0, 100),
        (0, 0, 0, Kind.COMBINE, MAIN, 50, 150),
        (0, 0, 0, Kind.EXPERTS, MAIN, 80, 120),
    )
    # The dispatch has 80..100 behind the experts; the combine shares its stream with them and has nothing.
    assert measure(records, PAIRS["communication"]).whole == Hidden(total=150, hidden=20)


def test_nothing_hides_behind_another_rank() -> None:
    records = _records((0, 0, 0, Kind.LOAD_UPDATE, BALANCER, 0, 10), (1, 0, 0, Kind.EXPERTS, MAIN, 0, 10))
    assert measure(records, PAIRS["balancer"]).ranks == {0: Hidden(10, 0)}


def test_host_calls_and_open_ranges_are_no_device_time() -> None:
    records = _records(
        (0, 0, 0, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, HOST, 0, 10),
        (0, 0, 0, Kind.LOAD_UPDATE, BALANCER, 5, OPEN),
        (0, 0, 0, Kind.EXPERTS, MAIN, 0, 10),
    )
    assert measure(records, PAIRS["statistic"]).whole == Hidden()


def test_staging_by_the_updater_counts_as_migration_alone() -> None:
    records = _records((0, 0, 0, Kind.STAGE_WEIGHTS, UPDATER, 0, 40), (0, 0, 0, Kind.EXPERTS, MAIN, 30, 50))
    assert measure(records, PAIRS["migration"]).whole == Hidden(40, 10)
    assert measure(records, PAIRS["balancer"]).whole == Hidden()


def test_by_iteration_layer_and_rank() -> None:
    records = _records(
        (0, 0, 0, Kind.EXPERTS, MAIN, 0, 10),
        (0, 0, 0, Kind.LOAD_UPDATE, BALANCER, 5, 15),
        (0, 0, 1, Kind.LOAD_UPDATE, BALANCER, 15, 18),
        (0, 1, 0, Kind.LOAD_UPDATE, BALANCER, 20, 24),
        (1, 1, 0, Kind.LOAD_UPDATE, BALANCER, 20, 29),
    )
    overlap = measure(records, PAIRS["balancer"])
    assert overlap.cells[0, 0, 0] == Hidden(10, 5)
    assert overlap.by_layer() == {0: Hidden(23, 5), 1: Hidden(3, 0)}
    assert overlap.by_iteration() == {0: Hidden(13, 5), 1: Hidden(13, 0)}
    assert overlap.ranks == {0: Hidden(17, 5), 1: Hidden(9, 0)}
    assert overlap.worst_exposed() == [8, 9]


_KINDS = st.sampled_from([Kind.EXPERTS, Kind.DISPATCH, Kind.LOAD_UPDATE, Kind.COMMIT, Kind.START_WAIT_GPU_STAGE])
_ROW = st.tuples(
    st.integers(0, 1), st.integers(0, 2), st.integers(0, 1), _KINDS, st.sampled_from([MAIN, COMM, BALANCER]),
    st.integers(0, 30), st.integers(0, 12),
).map(lambda row: (*row[:6], row[5] + row[6]))  # fmt: skip


def _naive(rows: list[Row], name: str, iteration: int) -> Hidden:
    """Count every ns of the pair in one iteration, rank by rank."""
    pair = PAIRS[name]
    total = hidden = 0
    for rank in (0, 1):
        mine = [row for row in rows if row[0] == rank]
        wanted = [row for row in mine if KINDS[row[3]].role in pair.hidden and row[1] == iteration]
        behind = [row for row in mine if KINDS[row[3]].role in pair.behind]
        covered: set[int] = set()
        for row in wanted:
            others = [b for b in behind if (b[4] != row[4] if pair.other_streams else b[4] == MAIN)]
            points = {point for b in others for point in range(b[5], b[6])}
            covered |= points & set(range(row[5], row[6]))
        total += len({point for row in wanted for point in range(row[5], row[6])})
        hidden += len(covered)
    return Hidden(total, hidden)


@settings(max_examples=400, deadline=None)
@given(st.lists(_ROW, max_size=14), st.sampled_from(sorted(PAIRS)))
def test_against_counting_every_nanosecond(rows: list[Row], name: str) -> None:
    measured = measure(_records(*rows), PAIRS[name]).by_iteration()
    for iteration in range(3):
        assert measured.get(iteration, Hidden()) == _naive(rows, name, iteration)
