"""Sums over the ranks are there as often as the scenario says, and begin after all that they hold was counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_eplb.analysis import run_folder
from moe_eplb.analysis.judges.order import stream_join
from moe_eplb.core.events import ROUTE_COUNTS, Kind
from moe_eplb.core.verdict import CheckResult, Status
from tests.support.run_folders import BALANCER_STREAM, LAYERS, RunBuilder, good_run, scenario

LAST = LAYERS - 1
SUMS = (Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE)


def judged(run: RunBuilder, folder: Path) -> CheckResult:
    return stream_join(run_folder.load(run.write(folder)))


def one_reduction() -> RunBuilder:
    """The good run with the sums of the last layer only, behind a vote."""
    balancer = scenario()["balancer"] | {"state": "device", "reduction": "iteration", "commit_delay": 2}
    run = good_run(balancer=balancer)
    run.records = [r for r in run.records if r["kind"] not in SUMS or r["layer"] == LAST]
    for found in run.find_records(Kind.STATISTIC_REDUCE, host=False):
        found["start"] += 10
        run.records.append(found | {"kind": int(Kind.VOTE), "start": found["start"] - 10, "end": found["start"]})
    return run


def counts_in_route(run: RunBuilder, **fields: int) -> list[dict[str, int]]:
    """Take away what counts by itself, and let the routes count."""
    for found in run.find_records(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, host=False, **fields):
        run.records.remove(found)
    routes = run.find_records(Kind.ROUTE, host=False, **fields)
    for route in routes:
        route["a"] |= ROUTE_COUNTS
    return routes


@pytest.mark.parametrize("make", [good_run, one_reduction])
@pytest.mark.parametrize("routed", [False, True])
def test_a_good_run_is_valid(make: Callable[[], RunBuilder], routed: bool, tmp_path: Path) -> None:
    run = make()
    if routed:
        counts_in_route(run)
    assert judged(run, tmp_path).status is Status.VALID


def _lose(run: RunBuilder, layer: int) -> None:
    run.records.remove(run.find_records(Kind.STATISTIC_REDUCE, host=False, rank=1, iteration=2, layer=layer)[0])


def _late(run: RunBuilder, layer: int) -> None:
    found = run.find_records(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, host=False, rank=0, iteration=1, layer=layer)[0]
    found["end"] = run.find_records(Kind.STATISTIC_REDUCE, host=False, rank=0, iteration=1, layer=LAST)[0]["end"]


def _late_route(run: RunBuilder, layer: int) -> None:
    route = counts_in_route(run, rank=0, iteration=1, layer=layer)[0]
    route["end"] = run.find_records(Kind.STATISTIC_REDUCE, host=False, rank=0, iteration=1, layer=LAST)[0]["start"] + 1


def _once_more(run: RunBuilder, layer: int) -> None:
    sums = run.find_records(Kind.STATISTIC_REDUCE, host=False, rank=0, iteration=3, layer=LAST)[0]
    run.records.append(sums | {"layer": layer, "start": sums["start"] - 1000, "end": sums["start"] - 900})


WRONG: dict[str, tuple[Callable[[], RunBuilder], Callable[[RunBuilder, int], Any], int, str]] = {
    "a layer's sum is missing": (good_run, _lose, 0, "no sum of statistics"),
    "the one sum is missing": (one_reduction, _lose, LAST, "no sum of statistics"),
    "a layer sums besides": (one_reduction, _once_more, 0, "holds already"),
    "a layer counts while its sum is made": (good_run, _late, LAST, "before counts ended"),
    "another layer counts while the sum is made": (one_reduction, _late, 0, "before counts ended"),
    "another layer routes while the sum is made": (one_reduction, _late_route, 0, "before counts ended"),
}


@pytest.mark.parametrize(("make", "damage", "layer", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_found(
    make: Callable[[], RunBuilder], damage: Callable[[RunBuilder, int], Any], layer: int, said: str, tmp_path: Path
) -> None:
    run = make()
    damage(run, layer)
    result = judged(run, tmp_path)
    assert result.status is Status.INVALID
    assert said in str(result)


def test_what_a_log_that_was_full_has_not_kept_is_unknown(tmp_path: Path) -> None:
    run = one_reduction()
    _lose(run, LAST)
    run.dropped[1] = 3
    assert judged(run, tmp_path).status is Status.UNKNOWN


def test_without_a_record_of_what_counted_nothing_is_known(tmp_path: Path) -> None:
    run = one_reduction()
    for found in run.find_records(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, host=False, rank=0, iteration=1, layer=0):
        assert found["stream"] == BALANCER_STREAM
        run.records.remove(found)
    assert judged(run, tmp_path).status is Status.UNKNOWN


def test_statistics_that_ride_along_need_no_sum(tmp_path: Path) -> None:
    run = good_run(statistics="global_ids")
    run.records = [r for r in run.records if r["kind"] != Kind.STATISTIC_REDUCE]
    assert judged(run, tmp_path).status is Status.VALID
