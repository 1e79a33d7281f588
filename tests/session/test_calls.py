"""Every scripted list of calls that is shipped ends as its file says, on a real balancer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_eplb.core import scenario as scenarios
from moe_eplb.core.protocol import TABLE
from moe_eplb.core.scenario import ExpectError
from moe_eplb.core.verdict import Status
from moe_eplb.session import RankPool

FILES = sorted((Path(__file__).parents[2] / "scenarios" / "calls").glob("*.yaml"))
REFUSED_AT_CALL_4 = FILES[0].with_name("no_statistics.yaml")  # with E110


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as ranks:
        yield ranks


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_calls_end_as_the_file_says(file: Path, pool: RankPool, tmp_path: Path) -> None:
    result = pool.run(scenarios.load(file), tmp_path / "run")
    assert {check.name: check.status for check in result.verdict.checks} == dict.fromkeys(
        ("run_complete", "balancer", "expected_error", "call_order", "leaks"), Status.VALID
    )
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "expected",
    [
        None,
        ExpectError(code="E111", at=4),
        ExpectError(code="E110", at=3),
        ExpectError(code="E110", at=4, contains="something else"),
    ],
)
def test_another_end_than_expected_is_invalid(expected: ExpectError | None, pool: RankPool, tmp_path: Path) -> None:
    other = scenarios.load(REFUSED_AT_CALL_4).model_copy(update={"expect_error": expected})
    result = pool.run(other, tmp_path / "run")
    assert {check.name: check.status for check in result.verdict.checks}["expected_error"] is Status.INVALID
    assert result.exit_code == 1


def test_every_code_of_the_table_has_its_calls() -> None:
    expected = {scenarios.load(file).expect_error for file in FILES}
    codes = {error.code for error in expected if error is not None}
    assert {row.code for rows in TABLE.values() for row in rows} <= codes
